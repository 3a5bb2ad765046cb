"""Networks of every kind, a user's own among them, go through the whole of find-ticket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import FIND, only_run, prunectl

import prunectl as package
from prunectl.pruning import cost
from prunectl.training import compactmodel

USER_MODEL = """
from torch import nn
def small(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
"""


def _goes_through(model: str, out: Path, *flags: object) -> None:
    argv = ("find-ticket", model, "fashion-mini", "--epochs", 2, "--detector", "epoch:1", "--out", out, "--json")
    small = (
        "--set",
        "data.train_images=200",
        "--set",
        "data.val_fraction=0.02",
        "--set",
        "train.lr=0.01",
        "--set",
        "ticket.probes_per_epoch=1",
    )
    printed = prunectl(*argv, *small, *flags)
    assert printed.code == 0, printed
    result, run = printed.document, only_run(out)
    assert result["outcome"] == "found" and result["params"]["ticket"] < result["params"]["dense"]
    net = package.load(run)
    assert sum(p.numel() for p in net.parameters()) == result["params"]["ticket"]
    saved = compactmodel.read(run / "compact")
    assert cost.count(net, saved.input_shape).macs == result["macs"]["ticket"] == saved.plan["macs"]
    x = torch.randn(2, *saved.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(x), package.load(run / "compact")(x))
    assert prunectl("show", run).code == 0


def test_a_users_own_network(tmp_path):
    (tmp_path / "nets.py").write_text(USER_MODEL)
    _goes_through(f"{tmp_path}/nets.py:small", tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["densenet121", "mobilenet_v2", "torchvision/mobilenet_v2", "vgg16", "preresnet-20", "alexnet", "resnet50"]
)
def test_other_networks(tmp_path, model):
    _goes_through(model, tmp_path)


def test_a_trained_network_is_pruned_and_fine_tuned(tmp_path):
    """The classic way: --from with a draw at epoch 0 takes the trained weights as they are."""
    trained = prunectl("train", *FIND[1:], "--epochs", "2", "--out", tmp_path, "--json").document
    tune = ("--from", trained["run"], "--detector", "epoch:0", "--epochs", "1", "--set", "train.lr=0.01")
    done = prunectl(*FIND, *tune, "--out", tmp_path, "--json")
    assert done.code == 0, done
    found = done.document
    assert found["training_flops"]["ratio"] is None and "not known" in found["training_flops"]["reason"]
    assert found["found_epoch"] == 0 and found["params"]["ticket"] < found["params"]["dense"] == trained["params"]
    rows = [json.loads(line) for line in (Path(trained["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert found["accuracy"]["dense_at_draw"] == pytest.approx(rows[-1]["val_top1"], abs=0.01)


def test_from_a_folder_without_a_network_is_refused(tmp_path):
    prunectl(*FIND, "--from", tmp_path, "--out", tmp_path / "runs").refused(2, str(tmp_path))
