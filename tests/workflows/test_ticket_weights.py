"""What the small network starts from: inherited, rewound, fresh, averaged or merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import FIND, only_run, prunectl, result_of, search_only

import prunectl as package
from prunectl import data, models
from prunectl.pruning.surgery import replay


def test_the_average_of_the_weights_follows_the_surgery(tmp_path):
    """The first convolution only loses filters, so those that stay are the dense network's, averaged as they were."""
    kept = {}
    for name, ema in (("plain", ()), ("averaged", ("--set", "train.ema=0.9"))):
        run = search_only(tmp_path / name, "--set", "train.precision=fp32", "--set", "model.width=1", *ema)
        gone = json.loads((run / "ticket.json").read_text())["dropped"]["conv1"]
        rows = [i for i in range(16) if i not in gone]
        kept[name] = package.load(run).conv1.weight
        assert gone and torch.allclose(kept[name], package.load(run / "dense").conv1.weight[rows], atol=1e-6)
    assert not torch.allclose(kept["plain"], kept["averaged"], atol=1e-3)


def test_the_average_keeps_its_own_batch_norm_statistics(tmp_path):
    """Without re-calibration the small network's are those that the average of the dense one had, which is what dense/ holds."""
    settings = ("train.ema=0.9", "train.precision=fp32", "model.width=1", "ticket.recalibration_batches=0")
    run = search_only(tmp_path, "--repair", "none", *(part for s in settings for part in ("--set", s)))
    rows = [i for i in range(16) if i not in json.loads((run / "ticket.json").read_text())["dropped"]["conv1"]]
    small, dense = package.load(run).bn1, package.load(run / "dense").bn1
    assert torch.allclose(small.running_var, dense.running_var[rows], rtol=1e-5)
    assert (small.running_var - 1).abs().max() > 0.02, "training must have moved them"


def test_merge_is_a_repair_of_its_own(tmp_path):
    runs = {r: search_only(tmp_path / r, *flags) for r, flags in (("none", ("--repair", "none")), ("merge", ("--merge",)))}
    tickets = {r: json.loads((run / "ticket.json").read_text()) for r, run in runs.items()}
    assert tickets["merge"]["repair"] == "merge" and tickets["merge"]["dropped"] == tickets["none"]["dropped"]
    none, merged = (package.load(runs[r]).state_dict() for r in ("none", "merge"))
    changed = {k for k in none if k.endswith("weight") and not torch.equal(none[k], merged[k])}
    assert changed and all(".conv2" in k for k in changed)  # the only readers of channels that no residual sum couples


def test_the_saved_average_has_the_recalibrated_statistics(tmp_path):
    """The average of the weights has followed the surgery, batch norm was re-estimated for it, and it is what is saved."""
    run = search_only(tmp_path, "--set", "train.ema=0.9", "--set", "train.precision=fp32")
    net, right, n = package.load(run), 0, 0
    for x, y in data.load("fashion-mini", train_images=200, val_fraction=0.02).eval_batches("val", batch_size=500):
        with torch.no_grad():
            right += int((net(x).argmax(1) == y).sum())
        n += len(y)
    assert 100 * right / n == pytest.approx(result_of(run)["accuracy"]["bn_recalibrated"])


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in package.load(run).state_dict().items() if "running" not in k and "tracked" not in k}


def test_inherited_weights_are_those_of_the_dense_network(tmp_path):
    run = search_only(tmp_path, "--repair", "none")
    plan = json.loads((run / "compact" / "plan.json").read_text())
    cut = replay(package.load(run / "dense"), [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


@pytest.mark.parametrize(("weights", "seed"), [("rewind:0", 7), ("reinit", 8)])
def test_rewound_and_fresh_weights_are_those_of_an_initial_network(tmp_path, weights, seed):
    """rewind:0 goes back to this run's own initial network, reinit to that of the next seed."""
    run = search_only(tmp_path, "--weights", weights, "--seed", 7)
    plan = json.loads((run / "compact" / "plan.json").read_text())
    initial = models.build("resnet8", num_classes=10, in_channels=1, image_size=28, width=0.5, seed=seed)
    cut = replay(initial, [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


def test_rewinding_to_the_epoch_of_the_draw_is_inheriting(tmp_path):
    flags = ("--repair", "none", "--epochs", "2")
    one, two = (_weights(search_only(tmp_path / w[:3], "--weights", w, *flags)) for w in ("rewind:1", "inherit"))
    assert all(torch.equal(t, two[k]) for k, t in one.items())


def test_rewinding_to_an_earlier_epoch_takes_its_weights(tmp_path):
    """The dense network after one epoch, saved by a run that draws then, is what a run that draws later rewinds to."""
    early = package.load(search_only(tmp_path / "early", "--epochs", "3") / "dense")
    run = search_only(tmp_path / "late", "--epochs", "3", "--detector", "epoch:2", "--weights", "rewind:1")
    plan = json.loads((run / "compact" / "plan.json").read_text())
    cut = replay(early, [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


def test_the_rate_climbs_again_after_a_draw(tmp_path):
    """At constant rate: the epoch after the draw ends at the full rate, an epoch of the climb below it."""
    rewarm = ("--set", "train.schedule=constant", "--set", "ticket.rewarm_epochs=2", "--set", "train.warmup_epochs=0")
    done = prunectl(*FIND, "--epochs", "4", "--detector", "epoch:1", *rewarm, "--out", tmp_path)
    assert done.code == 0, done
    rates = [json.loads(line)["lr"] for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    steps = 200 // 50  # the last step of an epoch begins one step before its end
    assert rates == pytest.approx([0.1, 0.1 * (1 - 1 / steps) / 2, 0.1 * (2 - 1 / steps) / 2, 0.1])


def test_several_draws_keep_the_weights_that_they_have(tmp_path):
    refused = prunectl(*FIND, "--set", "ticket.draws=2", "--set", "ticket.weights=reinit", "--out", tmp_path)
    refused.refused(2, "draws = 2", "reinit")
    prunectl(*FIND, "--merge", "--repair", "none", "--out", tmp_path).refused(2, "--merge", "--repair none")
    prunectl(*FIND, "--detector", "epoch:1", "--eps", "0.1", "--out", tmp_path).refused(2, "epoch:1", "leave eps out")


def test_a_draw_at_once_that_rewinds_waits_for_its_epoch(tmp_path):
    """Weights of epoch 1 are there after epoch 1 only."""
    done = prunectl(*FIND, "--detector", "epoch:0", "--weights", "rewind:1", "--epochs", "2", "--out", tmp_path, "--json")
    assert done.code == 0 and done.document["found_epoch"] == 1, done
