"""Two processes that torchrun starts train one network: one run folder, one result, the same weights on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import TINY, Outcome, only_run

import prunectl as package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _torchrun(*argv: object) -> Outcome:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunectl", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def _finite(run: Path) -> None:
    assert all(t.isfinite().all() for t in package.load(run).state_dict().values())


SPARE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Conv2d(in_channels, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13 * 13, num_classes))
        self[0].spare = nn.Linear(3, 4)
"""


@pytest.mark.parametrize("extra", [(), ("--set", "train.ema=0.9")])
def test_train(tmp_path, extra):
    """With the average, of a network of which no gradient reaches one layer."""
    (tmp_path / "net.py").write_text(SPARE)
    network = (f"{tmp_path / 'net.py'}:Net", "fashion-mini", *TINY[2:]) if extra else ("resnet8", "fashion-mini", *TINY)
    done = _torchrun("train", *network, "--epochs", 2, *extra, "--out", tmp_path / "runs", "--json")
    assert done.code == 0 and "UserWarning" not in done.err, done.err
    result = done.document  # one document, not two
    run = only_run(tmp_path / "runs")
    assert json.loads((run / "result.json").read_text())["accuracy"] == result["accuracy"]
    assert json.loads((run / "run.json").read_text())["hardware"]["ranks"] == 2
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    _finite(run)


@pytest.mark.parametrize("detector", [("epoch:0.5",), ("spline", "--eps", "0.9", "--window", 1)])
def test_find_ticket(tmp_path, detector):
    flags = ("--detector", *detector, "--set", "ticket.probes_per_epoch=2")
    done = _torchrun("find-ticket", "resnet8", "fashion-mini", *TINY, "--epochs", 3, *flags, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    result, run = done.document, only_run(tmp_path)
    assert result["outcome"] == "found" and done.err.count("ticket drawn") == 1
    assert sum(p.numel() for p in package.load(run).parameters()) == result["params"]["ticket"]
    _finite(run)


def test_several_draws(tmp_path):
    """The optimizer, the average and the next draw go on from the smaller network, the same on both."""
    gradual = ("--detector", "epoch:0.5", "--set", "ticket.draws=3", "--set", "ticket.draw_every=0.5", "--set", "train.ema=0.9")
    done = _torchrun("find-ticket", "resnet8", "fashion-mini", *TINY, "--epochs", 3, *gradual, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    result, run = done.document, only_run(tmp_path)
    ticket = json.loads((run / "ticket.json").read_text())
    assert len(ticket["draws"]) == 3 and abs(ticket["channels_removed"] - 0.5) <= 0.01
    assert sum(p.numel() for p in package.load(run).parameters()) == result["params"]["ticket"]
    _finite(run)


def test_resume_and_an_answer_from_disk(tmp_path):
    argv = ("train", "resnet8", "fashion-mini", *TINY, "--epochs", 3, "--out", tmp_path)
    whole = _torchrun(*argv, "--json")
    run = only_run(tmp_path)
    weights = {k: t.clone() for k, t in package.load(run).state_dict().items()}
    again = _torchrun(*argv, "--json")
    assert again.code == 0 and again.document == whole.document
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("epoch-00003.*"):
        path.unlink()
    refused = _torchrun(*argv)
    assert (
        refused.code != 0
        and "unfinished" in refused.err
        and 'Traceback (most recent call last):\n  File "' + package.__file__ not in refused.err
    )
    resumed = _torchrun(*argv, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert all(torch.equal(t, weights[k]) for k, t in package.load(run).state_dict().items())


def test_overwrite(tmp_path):
    argv = ("train", "resnet8", "fashion-mini", *TINY, "--epochs", 1, "--out", tmp_path)
    one, two = _torchrun(*argv, "--json"), _torchrun(*argv, "--overwrite", "--json")
    assert (one.code, two.code) == (0, 0)
    assert one.document["accuracy"] == two.document["accuracy"] and one.document["wall_s"] != two.document["wall_s"]
