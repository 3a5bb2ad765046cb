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


SMALL_RELU = """
import torch
from torch import nn
class Tied(nn.Module):
    \"\"\"A ReLU of eight units, two names for one layer, and a linear layer that reads channels last.\"\"\"
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 24, 3, stride=4), nn.BatchNorm2d(24), nn.ReLU())
        self.squeeze, self.once = nn.Linear(24, 8), nn.Conv2d(24, 24, 1)
        self.again, self.mix, self.head = self.once, nn.Linear(24, 40), nn.Linear(40, classes)
        self.excite = nn.Linear(8, 24)
    def forward(self, x):
        x = self.stem(x)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        x = torch.relu(self.again(torch.relu(self.once(x))))
        return self.head(torch.relu(self.mix(x.permute(0, 2, 3, 1))).mean((1, 2)))
def net(num_classes, in_channels):
    return Tied(in_channels, num_classes)
"""


@pytest.mark.parametrize("extra", [(), ("--set", "train.ema=0.9"), ("--repair", "merge"), ("--repair", "none")])
def test_a_network_of_small_relus_tied_layers_and_channels_that_lie_last(tmp_path, extra):
    """Searched over several epochs, so that what the detectors keep goes through checkpoints."""
    (tmp_path / "nets.py").write_text(SMALL_RELU)
    _goes_through(f"{tmp_path}/nets.py:net", tmp_path / "runs", "--epochs", 3, "--detector", "epoch:2", *extra)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    ["densenet121", "mobilenet_v2", "torchvision/mobilenet_v2", "vgg16", "preresnet-20", "alexnet", "resnet50", "torchvision/swin_t"],
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
