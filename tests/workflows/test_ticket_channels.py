"""Which channels go, and how many: budgets, rounding, several draws, protected layers."""

from __future__ import annotations

import json

import pytest
import torch
from running import FIND, only_run, prunectl, result_of, search_only

import prunectl as package
from prunectl.pruning import cost
from prunectl.pruning.surgery import replay
from prunectl.training import compactmodel


@pytest.mark.parametrize(("flag", "quantity"), [("--target-macs", "macs"), ("--target-params", "params")])
def test_a_target_is_met_within_two_percent_after_rounding(tmp_path, flag, quantity):
    result = result_of(search_only(tmp_path, flag, "0.6", "--set", "model.width=1"))
    assert result[quantity]["ticket"] / result[quantity]["dense"] == pytest.approx(0.6, rel=0.02)


def test_drawn_in_steps_the_ticket_meets_its_budget_and_replays_as_one(tmp_path):
    done = prunectl(*FIND, "--epochs", "3", "--detector", "epoch:1", "--target-macs", "0.6", "--set", "ticket.draws=2", "--out", tmp_path)
    assert done.code == 0, done
    run = only_run(tmp_path)
    ticket, plan, result = (json.loads((run / name).read_text()) for name in ("ticket.json", "compact/plan.json", "result.json"))
    assert [d["epoch"] for d in ticket["draws"]] == [1.0, 2.0] and len(plan["steps"]) == 2
    shares = [d["macs"] / result["macs"]["dense"] for d in ticket["draws"]]
    assert shares[0] == pytest.approx(0.6**0.5, rel=0.02) and shares[1] == pytest.approx(0.6, rel=0.02)
    dense = compactmodel.read(run / "dense").module()
    assert cost.count(dense, (1, 28, 28)).macs == result["macs"]["dense"]
    at_once = replay(dense, [ticket["dropped"]], torch.zeros(1, 1, 28, 28))
    assert {k: v.shape for k, v in at_once.state_dict().items()} == {k: v.shape for k, v in package.load(run).state_dict().items()}


@pytest.mark.parametrize("round_to", ["8", pytest.param("auto", marks=pytest.mark.slow)])
def test_draws_on_the_way_need_only_come_near(tmp_path, round_to):
    """In multiples of 8 no 16 % of these channels can go, which the first of four draws to half would take; half can."""
    draws = ("--sparsity", "0.5", "--round-to", round_to, "--set", "ticket.draws=4", "--set", "model.width=1")
    done = prunectl(*FIND, *draws, "--set", "ticket.draw_every=0.5", "--epochs", "3", "--detector", "epoch:1", "--out", tmp_path)
    assert done.code == 0, done
    ticket = json.loads((only_run(tmp_path) / "ticket.json").read_text())
    assert 2 <= len(ticket["draws"]) <= 4 and ticket["draws"][-1]["nth"] == 4
    assert ticket["channels_removed"] == pytest.approx(0.5, rel=0.02)
    assert all(after % 8 == 0 for _, after in ticket["widths"].values())


@pytest.mark.parametrize(("sparsity", "draws"), [("0.06", 4), *(pytest.param(s, 9, marks=pytest.mark.slow) for s in ("0.5", "0.66"))])
def test_many_draws_meet_what_one_draw_meets(tmp_path, sparsity, draws):
    """Draws whose share cannot be had are left to the next, and none takes what the last one is for."""
    when = ("--detector", "epoch:1", "--epochs", "4", "--set", "ticket.draw_every=0.25", "--set", "ticket.probes_per_epoch=4")
    done = prunectl(*FIND, *when, "--sparsity", sparsity, "--set", f"ticket.draws={draws}", "--set", "model.width=0.5", "--out", tmp_path)
    assert done.code == 0, done
    ticket = json.loads((only_run(tmp_path) / "ticket.json").read_text())
    assert ticket["channels_removed"] == pytest.approx(float(sparsity), abs=max(0.002501, 0.02 * float(sparsity)))


def test_draws_that_the_schedule_does_not_hold_are_fewer_and_meet_the_budget(tmp_path):
    """The detector fires where it likes: here after 1 of 2 epochs, and three draws need two more."""
    loose = ("--eps", "0.99", "--window", "3", "--set", "ticket.draws=3", "--set", "ticket.draw_every=0.75", "--target-macs", "0.6")
    done = prunectl(*FIND, "--epochs", "2", *loose, "--out", tmp_path, "--json")
    assert done.code == 0, done
    ticket = json.loads((only_run(tmp_path) / "ticket.json").read_text())
    assert [d["epoch"] for d in ticket["draws"]] == [1.0, 1.75]
    assert done.document["macs"]["ticket"] / done.document["macs"]["dense"] == pytest.approx(0.6, rel=0.02)
    assert any("holds 2 of 3 draws" in w for w in done.document["warnings"])


def test_round_to_and_scope(tmp_path):
    run = search_only(tmp_path, "--round-to", "4", "--scope", "global", "--set", "model.width=1", "--sparsity", "0.4")
    ticket = json.loads((run / "ticket.json").read_text())
    assert ticket["round_to"] == 4 and ticket["scope"] == "global"
    assert all(after % 4 == 0 for _, after in ticket["widths"].values())
    assert len({after / before for before, after in ticket["widths"].values()}) > 1  # a global threshold cuts unevenly


@pytest.mark.parametrize(("round_to", "sparsity", "used"), [("auto", "0.4", 2), ("auto", "0.5", 8), ("2", "0.4", 2)])
def test_widths_finer_than_engines_like_are_warned_of(tmp_path, round_to, sparsity, used):
    """Unless they were asked for; what rounding changed is shown either way."""
    run = search_only(tmp_path, "--sparsity", sparsity, "--round-to", round_to)
    ticket, warned = json.loads((run / "ticket.json").read_text()), [w for w in result_of(run)["warnings"] if "multiples of" in w]
    assert ticket["round_to"] == used and bool(warned) == (round_to == "auto" and used < 8)
    unrounded = prunectl(*FIND, "--sparsity", sparsity, "--round-to", "1", "--dry-run", "--json").document
    assert ticket["unrounded"] == {k: unrounded[k]["ticket"] for k in ("params", "macs")}


def test_keep_protects_layers_and_what_is_coupled_to_them(tmp_path):
    run = search_only(tmp_path, "--keep", r"layer3\.", "--sparsity", "0.3125")
    widths = {n: tuple(p.shape) for n, p in package.load(run).named_parameters() if n.endswith("conv1.weight")}
    dense = {n: tuple(p.shape) for n, p in package.load(run / "dense").named_parameters() if n.endswith("conv1.weight")}
    assert {n for n in dense if widths[n][0] != dense[n][0]} and not {
        n for n in dense if n.startswith("layer3.") and widths[n][0] != dense[n][0]
    }


@pytest.mark.parametrize("criterion", ["l1", "bn-scale", "random", "taylor"])
def test_other_criteria_go_the_whole_way(tmp_path, criterion):
    names = prunectl("list", "criteria", "--json").document["criteria"]
    run = search_only(tmp_path, "--criterion", next(n for n in names if n.startswith(criterion)))
    assert result_of(run)["outcome"] == "found"
