"""When a ticket is drawn: detectors, probes, fixed epochs, and none at all."""

from __future__ import annotations

import json

import pytest
import torch
from running import AT_1, COMMON_KEYS, FIND, FIND_KEYS, TINY, only_run, prunectl, result_of, search_only

import prunectl as package
from prunectl import models


def test_search_only_stops_at_the_draw(tmp_path):
    run = search_only(tmp_path)
    result = result_of(run)
    assert result["accuracy"]["final"] is None and "train --from" in result["accuracy"]["final_reason"]
    assert result["outcome"] == "found" and sum(p.numel() for p in package.load(run).parameters()) == result["params"]["ticket"]
    on = prunectl("train", "resnet8", "fashion-mini", *TINY, "--epochs", 1, "--from", run, "--out", tmp_path / "on", "--json").document
    assert on["params"] == result["params"]["ticket"]


def test_no_ticket_trains_the_dense_network_to_the_end_and_exits_3(tmp_path):
    argv = (*FIND, "--epochs", 2, "--detector", "spline", "--eps", "1e-9", "--out", tmp_path, "--json")
    printed = prunectl(*argv)
    run, result = only_run(tmp_path), printed.document
    assert printed.code == 3 and result["outcome"] == "not-found" and set(result) == COMMON_KEYS | FIND_KEYS
    assert (result["ticket"], result["compact"], result["found_epoch"]) == (None, None, None)
    assert result["params"]["ticket"] is None and result["accuracy"]["final"] is not None and "spline" in result["accuracy"]["reason"]
    near = min(d["max"] for d in result["distances"] if len(d["to"]) == 3)
    assert "came nearest after" in result["accuracy"]["reason"] and f"with {near:.3f} where eps is 1e-09" in result["accuracy"]["reason"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sum(p.numel() for p in package.load(run).parameters()) == result["params"]["dense"]
    again = prunectl(*argv)
    assert again.code == 3 and again.document == result
    assert prunectl("show", run).code == 0
    assert prunectl(*argv[:-1], "--overwrite").out.count("no ticket") == 1
    quietly = prunectl(*argv[:-1], "-q")
    assert (quietly.code, quietly.out) == (3, "") and quietly.err.count("\n") == 1 and "no ticket" in quietly.err


def test_while_the_rate_warms_up_nothing_has_settled(tmp_path):
    """A partition hardly moves under a tiny rate; the same detector without warm-up fires after one probe."""
    eager = (*FIND, "--epochs", "4", "--eps", "0.99", "--window", "1", "--json", "--out", tmp_path)
    for warm_up, epoch in (("0", 0.5), ("2", 2.0)):
        found = prunectl(*eager, "--set", f"train.warmup_epochs={warm_up}").document
        assert found["found_epoch"] == found["detectors"]["spline"]["fires_at"] == epoch


def test_a_draw_at_the_very_end_is_none(tmp_path):
    """Nothing would train the small network; --search-only, which leaves that to another command, does draw."""
    late = ("--epochs", "1", "--eps", "0.99", "--window", "3")
    prunectl(*FIND, *late, "--out", tmp_path).refused(2, "look 4", "has 4", "nothing trains", "--window")
    prunectl(*FIND, "--epochs", "2", "--detector", "epoch:1.99", "--out", tmp_path).refused(2, "step 8", "nothing trains", "earlier")
    slowly = (*FIND, "--epochs", "2", "--detector", "epi", "--window", "1")  # of an epoch of 4 steps
    prunectl(*slowly, "--out", tmp_path).refused(2, "look 7", "has 2")
    few = ("--set", "data.train_images=50", "--epochs", "3")  # one step an epoch: three looks, however many are asked for
    prunectl(*FIND, *few, "--window", "3", "--out", tmp_path).refused(2, "look 4", "has 3")
    calm = (*FIND, "--epochs", "2", "--window", "1", "--json", "--out", tmp_path / "a", "--eps")
    *before, last = (d["max"] for d in prunectl(*calm, "1e-9").document["distances"] if d["to"])
    assert last < min(before)  # the rate has fallen to nothing
    none = prunectl(*calm, (last + min(before)) / 2).document
    assert none["outcome"] == "not-found" and none["detectors"]["spline"]["fires_at"] == 2.0
    assert "fired only at the end of 2 epochs" in none["accuracy"]["reason"]
    searched = prunectl(*FIND, *late, "--search-only", "--out", tmp_path / "b", "--json").document
    assert searched["found_epoch"] == 1.0
    assert searched["training_flops"]["ratio"] is None and "--search-only" in searched["training_flops"]["reason"]
    prunectl(*FIND, "--epochs", "1", "--detector", "epoch:1", "--out", tmp_path).refused(2, "due after 1 epochs")


def test_a_fixed_draw_between_two_probes_is_taken_when_it_is_due(tmp_path):
    found = prunectl(
        *FIND, "--epochs", "1", "--detector", "epoch:0.6", "--set", "train.batch_size=20", "--out", tmp_path, "--json"
    ).document
    assert found["found_epoch"] == 0.6


def test_a_fixed_draw_may_be_any_share_of_an_epoch(tmp_path):
    """A third, in as many decimals as there are, of an epoch of three steps: after the first, not after the second."""
    argv = (
        *FIND,
        "--set",
        "train.batch_size=66",
        "--epochs",
        "1",
        "--detector",
        f"epoch:{1 / 3}",
        "--search-only",
        "--out",
        tmp_path,
        "--json",
    )
    assert prunectl(*argv).document["found_epoch"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("flags", [(), ("--search-only",)])
def test_a_draw_at_epoch_0_is_of_the_network_as_it_was_made(tmp_path, flags):
    done = prunectl(*FIND, "--epochs", "2", "--detector", "epoch:0", *flags, "--out", tmp_path)
    assert done.code == 0, done
    run = only_run(tmp_path)
    plan = json.loads((run / "dense" / "plan.json").read_text())
    untouched = models.build(**plan["model"], seed=0).state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in package.load(run / "dense").state_dict().items())
    result = result_of(run)
    assert result["found_epoch"] == 0 and result["macs"]["ticket"] < result["macs"]["dense"]
    assert result["detectors"]["epoch"]["fires_at"] == 0
    if flags:
        assert not (run / "metrics.jsonl").exists() and result["accuracy"]["final"] is None


def test_the_default_detector_can_fire(tmp_path):
    """A loose epsilon and a window of one: two probes suffice."""
    argv = (*FIND, "--epochs", 1, "--eps", "0.9", "--window", "1", "--search-only", "--out", tmp_path, "--json")
    result = prunectl(*argv).document
    assert result["outcome"] == "found" and result["detectors"]["spline"]["fires_at"] == result["found_epoch"] == 0.5


def test_the_canvas_probe(tmp_path):
    assert prunectl(*FIND, *AT_1, "--probe", "canvas", "--search-only", "--out", tmp_path).code == 0


def test_the_ticket_is_drawn_at_a_quarter_of_the_schedule_at_the_latest(tmp_path):
    """A dead network never is, and weights to go back to are waited for."""
    never = (*FIND, "--epochs", "8", "--eps", "1e-9", "--set", "train.warmup_epochs=0", "--out", tmp_path, "--json", "--set")
    drawn = prunectl(*never, "ticket.latest=0.2").document
    assert drawn["outcome"] == "found" and drawn["found_epoch"] == 1.75  # the first look of four an epoch at or after 1.6
    assert drawn["detectors"]["spline"]["fires_at"] is None and len(drawn["warnings"]) == 1
    assert "has not fired in 1.75 epochs; it came nearest after" in drawn["warnings"][0] and "ticket.latest=1" in drawn["warnings"][0]
    rewound = prunectl(*never, "ticket.latest=0.2", "--weights", "rewind:2").document
    assert rewound["found_epoch"] == 2
    file = tmp_path / "silent.py"
    file.write_text(
        "import torch\n\ndef silent(num_classes=10, in_channels=3, **_):\n"
        "    last = torch.nn.Conv2d(16, 16, 3)\n    last.bias.data.fill_(-1e6)\n    return torch.nn.Sequential(\n"
        "        torch.nn.Conv2d(in_channels, 16, 3), torch.nn.ReLU(), last, torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, num_classes))\n"
    )
    dead = ["find-ticket", f"{file}:silent", *never[2:]]
    dead[dead.index("model.width=0.5")] = "ticket.latest=0.2"
    assert prunectl(*dead[:-1]).document["outcome"] == "not-found"
