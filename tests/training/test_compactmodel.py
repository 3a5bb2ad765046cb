"""Saved networks: what is written comes back bit for bit, and what does not fit is refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prunectl import models
from prunectl.errors import CorruptFile, UsageError, VerificationFailed
from prunectl.pruning.surgery import analyse, compact
from prunectl.training import compactmodel

ARGUMENTS = {"name": "resnet8", "num_classes": 10, "in_channels": 1, "image_size": 28, "width": 1.0}
INFO = {"name": "fashion-mini"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network cut twice, each time in the numbering that the time before left, and its folder."""
    net, example, steps = models.build(**ARGUMENTS), torch.zeros(1, 1, 28, 28), []
    for _ in range(2):
        group = next(g for g in analyse(net, example).groups if not g.locked and g.channels > 8)
        steps.append({"dropped": {group.name: [0, group.channels - 1]}})
        net = compact(net, steps[-1]["dropped"], example).module
    folder = tmp_path_factory.mktemp("net")
    compactmodel.write(folder, net, arguments=ARGUMENTS, steps=steps, data=INFO, parent="a-run")
    return net, folder


def _edited(folder: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(folder, to)
    plan = json.loads((to / "plan.json").read_text())
    for key, value in changes.items():
        plan.pop(key) if value is None else plan.update({key: value})
    (to / "plan.json").write_text(json.dumps(plan))
    return to


def test_what_was_saved_comes_back(saved):
    net, folder = saved
    back = compactmodel.load(folder)
    assert not any(m.training for m in back.modules())
    assert all(torch.equal(t, back.state_dict()[k]) for k, t in net.state_dict().items())
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net.eval()(x), back(x))


def test_a_network_with_an_activation_of_its_last_training_pass_is_saved(tmp_path):
    net = models.build(**ARGUMENTS)
    net.kept = {"last": [net(torch.rand(2, 1, 28, 28))]}
    compactmodel.write(tmp_path, net, arguments=ARGUMENTS, steps=[], data=INFO, parent="")
    assert all(torch.equal(t, net.state_dict()[k]) for k, t in compactmodel.load(tmp_path).state_dict().items())


def test_the_plan_counts_what_is_there(saved):
    net, folder = saved
    plan = compactmodel.read(folder).plan
    assert plan["params"] == sum(p.numel() for p in net.parameters()) and plan["parent"] == "a-run" and plan["schema"] == 1
    assert len(plan["steps"]) == 2 and compactmodel.read(folder).input_shape == (1, 28, 28)


def test_writing_a_network_that_its_plan_does_not_describe_is_refused(tmp_path):
    net = models.build(**ARGUMENTS)
    with pytest.raises((VerificationFailed, CorruptFile)):
        compactmodel.write(tmp_path, net, arguments={**ARGUMENTS, "width": 0.5}, steps=[], data=INFO, parent="")


@pytest.mark.parametrize("key", ["model", "steps", "data", "params", "macs", "parent", "weights_sha256"])
def test_a_plan_without_one_of_its_keys(saved, tmp_path, key):
    with pytest.raises(CorruptFile, match=r"plan\.json"):
        compactmodel.read(_edited(saved[1], tmp_path / "net", **{key: None}))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": []},
        {"steps": [{}]},
        {"steps": 5},
        {"steps": [{"dropped": {"conv1": "all"}}]},
        {"model": {**ARGUMENTS, "colour": 1}},
        {"model": {**ARGUMENTS, "num_classes": "ten"}},
        {"model": 5},
        {"weights_sha256": "0"},
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense(saved, tmp_path, change):
    with pytest.raises(CorruptFile, match=r"net"):
        compactmodel.load(_edited(saved[1], tmp_path / "net", **change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": {**ARGUMENTS, "name": "resnet9"}}, CorruptFile),
        ({"model": {**ARGUMENTS, "name": "/nowhere/nets.py:net"}}, UsageError),
        ({"steps": [{"dropped": {"conv1": [999]}}]}, CorruptFile),
        ({"model": {**ARGUMENTS, "width": 0.5}}, CorruptFile),
        ({"steps": [{"dropped": {"nothing": [0]}}]}, CorruptFile),
    ],
    ids=str,
)
def test_a_plan_with_a_name_or_a_number_that_does_not_exist(saved, tmp_path, change, error):
    with pytest.raises(error):
        compactmodel.load(_edited(saved[1], tmp_path / "net", **change))


NETS = """
import torch
from torch import nn

def net(num_classes, in_channels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(in_channels, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2704, num_classes))
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("MaxPool2d(2)", "AvgPool2d(2)", "answers otherwise"),
        ("nn.ReLU()", "nn.RReLU(9, 9.9)", "answers otherwise"),
        ("nn.ReLU()", "nn.Threshold(9, float('nan'))", "answers otherwise"),
        ("nn.ReLU()", "nn.Unflatten(1, (2, 8))", "fails with"),
        ("in_channels, 16, 3", "in_channels, 16, 3, bias=False", "does not fit"),
    ],
)
def test_a_users_file_that_was_edited_since_is_named(tmp_path, old, new, words):
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    arguments = {**ARGUMENTS, "name": f"{file}:net"}
    compactmodel.write(tmp_path / "net", models.build(**arguments), arguments=arguments, steps=[], data=INFO, parent="")
    compactmodel.load(tmp_path / "net")
    file.write_text(NETS + "# a comment")
    compactmodel.load(tmp_path / "net")
    file.write_text(NETS.replace(old, new))
    with pytest.raises(CorruptFile, match=rf"{words}.*nets\.py may have changed"):
        compactmodel.load(tmp_path / "net")


def test_a_users_file_that_was_edited_while_it_trained(tmp_path):
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    arguments = {**ARGUMENTS, "name": f"{file}:net"}
    trained = models.build(**arguments)
    file.write_text(NETS.replace("MaxPool2d(2)", "AvgPool2d(2)"))
    with pytest.raises(VerificationFailed, match=r"does not answer as what was trained.*nets\.py may have changed"):
        compactmodel.write(tmp_path / "net", trained, arguments=arguments, steps=[], data=INFO, parent="")


def test_autocast_around_a_load_changes_nothing(saved):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compactmodel.load(saved[1])


@pytest.mark.parametrize(
    "change",
    [{"answer": "abc"}, {"answer": [None]}, {"answer": {"x": 1}}, {"model": {**ARGUMENTS, "name": 5}}, {"macs": "q"}, {"parent": 3}],
    ids=str,
)
def test_a_plan_whose_values_are_of_another_kind(saved, tmp_path, change):
    with pytest.raises(CorruptFile, match=r"plan\.json is damaged"):
        compactmodel.load(_edited(saved[1], tmp_path / "net", **change))


def test_a_plan_that_counts_otherwise_and_one_of_an_earlier_version(saved, tmp_path):
    with pytest.raises(CorruptFile, match="says 2 parameters"):
        compactmodel.load(_edited(saved[1], tmp_path / "two", params=2))
    compactmodel.load(_edited(saved[1], tmp_path / "earlier", answer=None))


def test_what_does_not_answer_is_saved_without_an_answer(tmp_path):
    net = models.build(**ARGUMENTS)
    net.fc.weight.data.fill_(3e38)
    compactmodel.write(tmp_path, net, arguments=ARGUMENTS, steps=[], data=INFO, parent="")
    assert compactmodel.read(tmp_path).plan["answer"] is None
    compactmodel.load(tmp_path)


def test_locate_says_what_is_missing(tmp_path):
    for path, words in ((tmp_path / "nowhere", "no run or saved network"), (tmp_path, "holds no saved network")):
        with pytest.raises(UsageError, match=words):
            compactmodel.locate(path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CorruptFile, match=r"notes\.txt"):
        compactmodel.locate(tmp_path / "notes.txt")
