"""`find-ticket` from the command to the reloaded network, and what `show` and `train --from` make of it."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import TINY, only_run, prunectl, run_folders

import prunectl as package
from prunectl import data, models
from prunectl.errors import CorruptFile
from prunectl.pruning import cost
from prunectl.pruning.surgery import replay
from prunectl.training import compactmodel

FIND = ("find-ticket", "resnet8", "fashion-mini", *TINY)
AT_1 = ("--epochs", "2", "--detector", "epoch:1")
COMMON_KEYS = {"schema", "verb", "run", "outcome", "model", "dataset", "seed", "wall_s", "versions", "warnings"}
FIND_KEYS = {"found_epoch", "distances", "detectors", "accuracy", "params", "macs", "training_flops", "ticket", "compact", "dense"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A finished search that drew after one of two epochs, and what it printed."""
    out = tmp_path_factory.mktemp("found") / "runs"
    printed = prunectl(*FIND, *AT_1, "--out", out, "--json")
    assert printed.code == 0, printed
    return only_run(out), printed


def _result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def _search_only(out: Path, *flags: object) -> Path:
    done = prunectl(*FIND, *AT_1, "--search-only", "--out", out, *flags)
    assert done.code == 0, done
    return only_run(out)


# -- the result ------------------------------------------------------------------------------------------------------


def test_the_document_has_the_promised_keys_and_is_the_result_with_absolute_paths(found):
    run, printed = found
    result = _result(run)
    assert set(result) == COMMON_KEYS | FIND_KEYS
    assert {k for k in result if printed.document[k] != result[k]} == {"run", "ticket", "compact", "dense"}
    for key in ("ticket", "compact", "dense"):
        assert printed.document[key] == str(run / result[key]) and (run / result[key]).exists()
    assert (result["schema"], result["verb"], result["outcome"], result["run"]) == (1, "find-ticket", "found", run.name)


def test_the_numbers_hang_together(found):
    result = _result(found[0])
    assert result["found_epoch"] == 1.0 and result["detectors"]["epoch"]["fires_at"] == 1.0
    assert {"dense_at_draw", "raw", "bn_recalibrated", "final"} <= set(result["accuracy"])
    assert all(0 <= result["accuracy"][k] <= 100 for k in ("dense_at_draw", "raw", "bn_recalibrated", "final"))
    for quantity in ("params", "macs"):
        assert 0 < result[quantity]["ticket"] < result[quantity]["dense"]
    flops = result["training_flops"]
    assert flops["ratio"] == pytest.approx(flops["spent"] / flops["dense"])
    for reading in result["detectors"]["spline"]["distances"]:
        assert all(0 <= d <= 1 for d in reading["to"]) and reading["max"] == max(reading["to"], default=None)


def test_training_flops_count_both_networks_the_probes_and_the_recalibration(found):
    """3 x 2 MACs an image of training (forward, and backward at twice its cost), 2 x MACs an image that is only looked at."""
    result = _result(found[0])
    dense, small = result["macs"]["dense"], result["macs"]["ticket"]
    assert result["training_flops"]["dense"] == 6 * dense * 200 * 2
    training = 6 * 200 * (dense + small)
    looked_at = result["training_flops"]["spent"] - training
    assert 0 < looked_at <= 2 * (dense * (256 * 4 + 4000) + small * 200 * 20)


def test_a_teacher_is_paid_for(found, tmp_path):
    done = prunectl(*FIND, *AT_1, "--set", "train.distill=0.5", "--out", tmp_path)
    assert done.code == 0, done
    taught, alone = _result(only_run(tmp_path)), _result(found[0])
    assert taught["training_flops"]["spent"] - alone["training_flops"]["spent"] == 2 * alone["macs"]["dense"] * 200


def test_the_run_folder_holds_what_is_documented(found):
    run, _ = found
    names = {p.name for p in run.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "metrics.csv", "checkpoints", "result.json", "ticket.json"} <= names
    assert (run.parent / "latest").resolve() == run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((run / "metrics.csv").open(newline="")))
    assert [r["epoch"] for r in rows] == [1, 2] and [int(r["epoch"]) for r in table] == [1, 2]
    assert rows[0].keys() == table[0].keys()
    info = json.loads((run / "run.json").read_text())
    assert {"argv", "versions", "hardware", "seed", "git"} <= set(info)


def test_json_keeps_stdout_to_the_document_and_the_rest_on_stderr(found):
    assert "ticket drawn after 1 epochs" in found[1].err and "error" not in found[1].err


def test_the_ticket_tells_which_channels_went(found):
    run, _ = found
    ticket = json.loads((run / "ticket.json").read_text())
    plan = json.loads((run / "compact" / "plan.json").read_text())
    assert [step["dropped"] for step in plan["steps"]] == [ticket["dropped"]]
    for group, (before, after) in ticket["widths"].items():
        dropped = ticket["dropped"].get(group, [])
        assert dropped == sorted(set(dropped)) and len(dropped) == before - after and all(0 <= c < before for c in dropped)
    assert abs(ticket["channels_removed"] - 0.5) <= 0.02 * 0.5


# -- the network -----------------------------------------------------------------------------------------------------


def test_load_gives_the_pruned_network_in_eval_mode_with_the_counted_cost(found):
    run, _ = found
    result, net = _result(run), package.load(run)
    assert not any(m.training for m in net.modules())
    assert sum(p.numel() for p in net.parameters()) == result["params"]["ticket"]
    assert cost.count(net, (1, 28, 28)).macs == result["macs"]["ticket"]
    dense = package.load(run / "dense")
    assert sum(p.numel() for p in dense.parameters()) == result["params"]["dense"]
    assert (run / "compact" / "model.safetensors").stat().st_size < (run / "dense" / "model.safetensors").stat().st_size


def test_every_way_to_name_the_network_and_another_process_give_the_same_bits(found):
    run, _ = found
    x = torch.linspace(-2, 2, 4 * 28 * 28).view(4, 1, 28, 28)
    with torch.no_grad():
        logits = package.load(run)(x)
        for path in (run / "compact", run / "compact" / "plan.json", run / "compact" / "model.safetensors", run.parent / "latest"):
            assert torch.equal(package.load(path)(x), logits), path
    code = (
        "import sys, torch, prunectl; x = torch.linspace(-2, 2, 4 * 28 * 28).view(4, 1, 28, 28)\n"
        "with torch.no_grad(): sys.stdout.write(prunectl.load(sys.argv[1])(x).numpy().tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=120)
    assert bytes.fromhex(done.stdout) == logits.numpy().tobytes(), done.stderr


def test_the_loaded_network_has_the_reported_test_accuracy(found):
    run, _ = found
    net, right, n = package.load(run), 0, 0
    for x, y in data.load("fashion-mini", train_images=200).eval_batches("test", batch_size=500):
        with torch.no_grad():
            right += int((net(x).argmax(1) == y).sum())
        n += len(y)
    # trained in bf16 where that is fast, answered here in fp32: a few of 2,000 images may tip over
    assert abs(100 * right / n - _result(run)["accuracy"]["final"]) <= 0.5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1] + b"!"), "sha256"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: (d / "plan.json").write_text("{"), "plan.json"),
        (lambda d: (d / "plan.json").write_text("[]"), "plan.json"),
        (lambda d: (d / "plan.json").write_text((d / "plan.json").read_text().replace('"resnet8"', '"resnet20"')), "does not"),
    ],
    ids=["flipped", "no weights", "cut plan", "wrong plan", "other network"],
)
def test_a_spoilt_network_is_refused(found, tmp_path, spoil, words):
    shutil.copytree(found[0] / "compact", tmp_path / "net")
    spoil(tmp_path / "net")
    prunectl("show", tmp_path / "net").refused(4, words)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("matching_sum", [False, True])
def test_a_pickle_in_the_weights_place_is_refused_everywhere_and_never_opened(found, tmp_path, matching_sum):
    net, bomb = tmp_path / "net", tmp_path / "executed"
    shutil.copytree(found[0] / "compact", net)
    torch.save({"w": _Touch(bomb)}, net / "model.safetensors")
    if matching_sum:
        plan = json.loads((net / "plan.json").read_text())
        plan["weights_sha256"] = compactmodel.sha256(net / "model.safetensors")
        (net / "plan.json").write_text(json.dumps(plan))
    prunectl("show", net).refused(4, "pickle" if matching_sum else "sha256")
    train = prunectl("train", "resnet8", "fashion-mini", *TINY, "--from", net, "--out", tmp_path / "runs")
    train.refused(4, "--from")
    with pytest.raises(CorruptFile):
        package.load(net)
    assert not bomb.exists() and run_folders(tmp_path / "runs") == []


@pytest.mark.parametrize(("name", "words"), [("x.pt", "x.pt"), ("checkpoint.bin", "checkpoint.bin"), ("model.safetensors", "plan.json")])
def test_a_pickle_as_starting_point_is_refused_and_never_opened(tmp_path, name, words):
    bomb = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(_Touch(bomb)))
    failed = prunectl("train", "resnet8", "fashion-mini", *TINY, "--from", tmp_path / name, "--out", tmp_path / "runs")
    failed.refused(4, words)
    assert not bomb.exists() and run_folders(tmp_path / "runs") == []


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_lists_layers_before_and_after(found):
    run, _ = found
    shown, document = prunectl("show", run), prunectl("show", run, "--json").document
    assert shown.code == 0 and "conv1" in shown.out and shown.err == ""
    assert document["params"] == _result(run)["params"]["ticket"] and document["result"] == _result(run)
    assert any(layer["before"] != layer["after"] for layer in document["layers"])
    assert sum(layer["params"] for layer in document["layers"]) < document["params"]


def test_show_finds_the_latest_run_by_itself(found, monkeypatch):
    monkeypatch.chdir(found[0].parent.parent)
    assert prunectl("show").code == 0


def test_show_why(found):
    run, _ = found
    ticket = json.loads((run / "ticket.json").read_text())
    coupled = next(name for name, members in ticket["members"].items() if len(members) > 2 and name in ticket["dropped"])
    for layer in ticket["members"][coupled]:
        said = prunectl("show", run, "--why", layer)
        sides = {"outputs": layer in ticket["producers"][coupled], "inputs": layer in ticket["readers"][coupled]}
        line = next(text for text in said.out.splitlines() if f"(channels of {coupled})" in text)
        assert said.code == 0 and all((side in line.split(" of ")[0]) == there for side, there in sides.items()), line
    assert not any("bn" in name for names in ticket["producers"].values() for name in names)
    assert "inputs of fc " in prunectl("show", run, "--why", "fc").out
    assert "stay whole: " in prunectl("show", run, "--why", next(iter(ticket["kept"]))).out
    document = prunectl("show", run, "--why", coupled, "--json").document
    assert {g["group"]: g["dropped"] for g in document["groups"]}[coupled] == ticket["dropped"][coupled]
    prunectl("show", run, "--why", coupled + "x").refused(2, "did you mean", coupled)


def test_show_why_without_a_ticket(found):
    prunectl("show", found[0] / "dense", "--why", "conv1").refused(2, "ticket.json")


def test_options_that_would_do_nothing_are_refused(tmp_path):
    prunectl(*FIND, "--set", "ticket.pooling=mean", "--out", tmp_path).refused(2, "pooling = mean", "scope = global")
    prunectl(*FIND, "--keep", "Layer3", "--out", tmp_path).refused(2, "Layer3", "matches no layer", "layer")


# -- train --from ----------------------------------------------------------------------------------------------------


def test_train_from_a_ticket_trains_the_small_network(found, tmp_path):
    start = found[0].parent / "latest"
    argv = ("train", "resnet8", "fashion-mini", *TINY, "--epochs", 1, "--from", start, "--out", tmp_path, "--json")
    document = prunectl(*argv).document
    assert document["params"] == _result(found[0])["params"]["ticket"]
    assert sum(p.numel() for p in package.load(document["saved"]).parameters()) == document["params"]


def test_epochs_0_keeps_the_starting_point_bit_for_bit(found, tmp_path):
    argv = ("train", "resnet8", "fashion-mini", *TINY, "--epochs", 0, "--from", found[0], "--out", tmp_path, "--json")
    document = prunectl(*argv).document
    assert (document["outcome"], document["epochs"], document["training_flops"], document["images_per_s"]) == ("untrained", 0, 0, None)
    one, two = package.load(found[0]).state_dict(), package.load(document["saved"]).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_epochs_0_makes_an_untrained_network(tmp_path):
    document = prunectl("train", "resnet8", "fashion-mini", *TINY, "--epochs", 0, "--seed", 5, "--out", tmp_path, "--json").document
    fresh = models.build("resnet8", num_classes=10, in_channels=1, image_size=28, width=0.5, seed=5)
    assert all(torch.equal(t, package.load(document["run"]).state_dict()[k]) for k, t in fresh.state_dict().items())


@pytest.mark.parametrize(("model", "dataset", "words"), [("resnet20", "fashion-mini", "name"), ("resnet8", "elsewhere", "in_channels")])
def test_a_start_of_another_network_or_data_set_is_refused(found, tmp_path, model, dataset, words):
    if dataset == "elsewhere":
        from PIL import Image

        for split in ("train", "val"):
            for c in "ab":
                (tmp_path / "photos" / split / c).mkdir(parents=True)
                for i in range(10):
                    Image.new("RGB", (28, 28), (i, 2 * i, 3 * i)).save(tmp_path / "photos" / split / c / f"{i}.png")
        dataset = str(tmp_path / "photos")
    argv = ("train", model, dataset, "--epochs", 1, "--from", found[0], "--out", tmp_path / "runs")
    prunectl(*argv).refused(2, "--from", "same model and data set")


# -- options ---------------------------------------------------------------------------------------------------------


def test_search_only_stops_at_the_draw(tmp_path):
    run = _search_only(tmp_path)
    result = _result(run)
    assert result["accuracy"]["final"] is None and "train --from" in result["accuracy"]["final_reason"]
    assert result["outcome"] == "found" and sum(p.numel() for p in package.load(run).parameters()) == result["params"]["ticket"]
    on = prunectl("train", "resnet8", "fashion-mini", *TINY, "--epochs", 1, "--from", run, "--out", tmp_path / "on", "--json").document
    assert on["params"] == result["params"]["ticket"]


def test_the_average_of_the_weights_follows_the_surgery(tmp_path):
    """The first convolution only loses filters, so those that stay are the dense network's, averaged as they were."""
    kept = {}
    for name, ema in (("plain", ()), ("averaged", ("--set", "train.ema=0.9"))):
        run = _search_only(tmp_path / name, "--set", "train.precision=fp32", "--set", "model.width=1", *ema)
        gone = json.loads((run / "ticket.json").read_text())["dropped"]["conv1"]
        rows = [i for i in range(16) if i not in gone]
        kept[name] = package.load(run).conv1.weight
        assert gone and torch.allclose(kept[name], package.load(run / "dense").conv1.weight[rows], atol=1e-6)
    assert not torch.allclose(kept["plain"], kept["averaged"], atol=1e-3)


def test_merge_is_a_repair_of_its_own(tmp_path):
    runs = {r: _search_only(tmp_path / r, *flags) for r, flags in (("none", ("--repair", "none")), ("merge", ("--merge",)))}
    tickets = {r: json.loads((run / "ticket.json").read_text()) for r, run in runs.items()}
    assert tickets["merge"]["repair"] == "merge" and tickets["merge"]["dropped"] == tickets["none"]["dropped"]
    none, merged = (package.load(runs[r]).state_dict() for r in ("none", "merge"))
    changed = {k for k in none if k.endswith("weight") and not torch.equal(none[k], merged[k])}
    assert changed and all(".conv2" in k for k in changed)  # the only readers of channels that no residual sum couples


def test_the_saved_average_has_the_recalibrated_statistics(tmp_path):
    """The average of the weights has followed the surgery, batch norm was re-estimated for it, and it is what is saved."""
    run = _search_only(tmp_path, "--set", "train.ema=0.9", "--set", "train.precision=fp32")
    net, right, n = package.load(run), 0, 0
    for x, y in data.load("fashion-mini", train_images=200, val_fraction=0.02).eval_batches("val", batch_size=500):
        with torch.no_grad():
            right += int((net(x).argmax(1) == y).sum())
        n += len(y)
    assert 100 * right / n == pytest.approx(_result(run)["accuracy"]["bn_recalibrated"])


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in package.load(run).state_dict().items() if "running" not in k and "tracked" not in k}


def test_inherited_weights_are_those_of_the_dense_network(tmp_path):
    run = _search_only(tmp_path, "--repair", "none")
    plan = json.loads((run / "compact" / "plan.json").read_text())
    cut = replay(package.load(run / "dense"), [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


@pytest.mark.parametrize(("weights", "seed"), [("rewind:0", 7), ("reinit", 8)])
def test_rewound_and_fresh_weights_are_those_of_an_initial_network(tmp_path, weights, seed):
    """rewind:0 goes back to this run's own initial network, reinit to that of the next seed."""
    run = _search_only(tmp_path, "--weights", weights, "--seed", 7)
    plan = json.loads((run / "compact" / "plan.json").read_text())
    initial = models.build("resnet8", num_classes=10, in_channels=1, image_size=28, width=0.5, seed=seed)
    cut = replay(initial, [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


def test_rewinding_to_the_epoch_of_the_draw_is_inheriting(tmp_path):
    flags = ("--repair", "none", "--epochs", "2")
    one, two = (_weights(_search_only(tmp_path / w[:3], "--weights", w, *flags)) for w in ("rewind:1", "inherit"))
    assert all(torch.equal(t, two[k]) for k, t in one.items())


def test_rewinding_to_an_earlier_epoch_takes_its_weights(tmp_path):
    """The dense network after one epoch, saved by a run that draws then, is what a run that draws later rewinds to."""
    early = package.load(_search_only(tmp_path / "early", "--epochs", "3") / "dense")
    run = _search_only(tmp_path / "late", "--epochs", "3", "--detector", "epoch:2", "--weights", "rewind:1")
    plan = json.loads((run / "compact" / "plan.json").read_text())
    cut = replay(early, [s["dropped"] for s in plan["steps"]], torch.zeros(1, 1, 28, 28)).state_dict()
    assert all(torch.equal(t, cut[k]) for k, t in _weights(run).items())


def test_no_ticket_trains_the_dense_network_to_the_end_and_exits_3(tmp_path):
    argv = (*FIND, "--epochs", 2, "--detector", "spline", "--eps", "1e-9", "--out", tmp_path, "--json")
    printed = prunectl(*argv)
    run, result = only_run(tmp_path), printed.document
    assert printed.code == 3 and result["outcome"] == "not-found" and set(result) == COMMON_KEYS | FIND_KEYS
    assert (result["ticket"], result["compact"], result["found_epoch"]) == (None, None, None)
    assert result["params"]["ticket"] is None and result["accuracy"]["final"] is not None and "spline" in result["accuracy"]["reason"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sum(p.numel() for p in package.load(run).parameters()) == result["params"]["dense"]
    again = prunectl(*argv)
    assert again.code == 3 and again.document == result
    assert prunectl("show", run).code == 0
    assert prunectl(*argv[:-1], "--overwrite").out.count("no ticket") == 1


@pytest.mark.parametrize(("flag", "quantity"), [("--target-macs", "macs"), ("--target-params", "params")])
def test_a_target_is_met_within_two_percent_after_rounding(tmp_path, flag, quantity):
    result = _result(_search_only(tmp_path, flag, "0.6", "--set", "model.width=1"))
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


@pytest.mark.parametrize("round_to", ["8", "auto"])
def test_draws_on_the_way_need_only_come_near(tmp_path, round_to):
    """In multiples of 8 no 16 % of these channels can go, which the first of four draws to half would take; half can."""
    draws = ("--sparsity", "0.5", "--round-to", round_to, "--set", "ticket.draws=4", "--set", "model.width=1")
    done = prunectl(*FIND, *draws, "--set", "ticket.draw_every=0.5", "--epochs", "3", "--detector", "epoch:1", "--out", tmp_path)
    assert done.code == 0, done
    ticket = json.loads((only_run(tmp_path) / "ticket.json").read_text())
    assert 2 <= len(ticket["draws"]) <= 4 and ticket["draws"][-1]["nth"] == 4
    assert ticket["channels_removed"] == pytest.approx(0.5, rel=0.02)
    assert all(after % 8 == 0 for _, after in ticket["widths"].values())


@pytest.mark.parametrize(("sparsity", "draws"), [("0.5", 9), ("0.06", 4), ("0.66", 9)])
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


def test_while_the_rate_warms_up_nothing_has_settled(tmp_path):
    """A partition hardly moves under a tiny rate; the same detector without warm-up fires after one probe."""
    eager = (*FIND, "--epochs", "4", "--eps", "0.99", "--window", "1", "--json", "--out", tmp_path)
    for warm_up, epoch in (("0", 0.5), ("2", 2.0)):
        found = prunectl(*eager, "--set", f"train.warmup_epochs={warm_up}").document
        assert found["found_epoch"] == found["detectors"]["spline"]["fires_at"] == epoch


def test_a_draw_at_the_very_end_is_none(tmp_path):
    """Nothing would train the small network; --search-only, which leaves that to another command, does draw."""
    late = ("--epochs", "1", "--eps", "0.99", "--window", "3")
    none = prunectl(*FIND, *late, "--out", tmp_path / "a", "--json").document
    assert none["outcome"] == "not-found" and none["detectors"]["spline"]["fires_at"] == 1.0
    assert "fired only at the end of 1 epochs" in none["accuracy"]["reason"]
    searched = prunectl(*FIND, *late, "--search-only", "--out", tmp_path / "b", "--json").document
    assert searched["found_epoch"] == 1.0
    assert searched["training_flops"]["ratio"] is None and "--search-only" in searched["training_flops"]["reason"]
    prunectl(*FIND, "--epochs", "1", "--detector", "epoch:1", "--out", tmp_path).refused(2, "due after 1 epochs")


def test_a_fixed_draw_between_two_probes_is_taken_when_it_is_due(tmp_path):
    found = prunectl(
        *FIND, "--epochs", "1", "--detector", "epoch:0.6", "--set", "train.batch_size=20", "--out", tmp_path, "--json"
    ).document
    assert found["found_epoch"] == 0.6


@pytest.mark.parametrize("flags", [(), ("--search-only",)])
def test_a_draw_at_epoch_0_is_of_the_network_as_it_was_made(tmp_path, flags):
    done = prunectl(*FIND, "--epochs", "2", "--detector", "epoch:0", *flags, "--out", tmp_path)
    assert done.code == 0, done
    run = only_run(tmp_path)
    plan = json.loads((run / "dense" / "plan.json").read_text())
    untouched = models.build(**plan["model"], seed=0).state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in package.load(run / "dense").state_dict().items())
    result = _result(run)
    assert result["found_epoch"] == 0 and result["macs"]["ticket"] < result["macs"]["dense"]
    assert result["detectors"]["epoch"]["fires_at"] == 0
    if flags:
        assert not (run / "metrics.jsonl").exists() and result["accuracy"]["final"] is None


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


def test_the_search_is_kept_as_numbers_and_as_a_picture(found):
    run, _ = found
    table = list(csv.DictReader((run / "distances.csv").open(newline="")))
    kept = json.loads((run / "probes.json").read_text())["matrix"]
    assert [float(row["epoch"]) for row in table] == kept["epochs"] and kept["epochs"][-1] == 1.0
    deciding = _result(run)["detectors"]["spline"]["distances"][-1]["to"]
    assert kept["distances"][-1][-2] == pytest.approx(deciding[0], abs=0.02)  # the matrix samples the units
    assert (run / "search.png").read_bytes().startswith(b"\x89PNG")


def test_round_to_and_scope(tmp_path):
    run = _search_only(tmp_path, "--round-to", "4", "--scope", "global", "--set", "model.width=1", "--sparsity", "0.4")
    ticket = json.loads((run / "ticket.json").read_text())
    assert ticket["round_to"] == 4 and ticket["scope"] == "global"
    assert all(after % 4 == 0 for _, after in ticket["widths"].values())
    assert len({after / before for before, after in ticket["widths"].values()}) > 1  # a global threshold cuts unevenly


def test_keep_protects_layers_and_what_is_coupled_to_them(tmp_path):
    run = _search_only(tmp_path, "--keep", r"layer3\.", "--sparsity", "0.3125")
    widths = {n: tuple(p.shape) for n, p in package.load(run).named_parameters() if n.endswith("conv1.weight")}
    dense = {n: tuple(p.shape) for n, p in package.load(run / "dense").named_parameters() if n.endswith("conv1.weight")}
    assert {n for n in dense if widths[n][0] != dense[n][0]} and not {
        n for n in dense if n.startswith("layer3.") and widths[n][0] != dense[n][0]
    }


@pytest.mark.parametrize("criterion", ["l1", "bn-scale", "random", "taylor"])
def test_other_criteria_go_the_whole_way(tmp_path, criterion):
    names = prunectl("list", "criteria", "--json").document["criteria"]
    run = _search_only(tmp_path, "--criterion", next(n for n in names if n.startswith(criterion)))
    assert _result(run)["outcome"] == "found"


def test_the_default_detector_can_fire(tmp_path):
    """A loose epsilon and a window of one: two probes suffice."""
    argv = (*FIND, "--epochs", 1, "--eps", "0.9", "--window", "1", "--search-only", "--out", tmp_path, "--json")
    result = prunectl(*argv).document
    assert result["outcome"] == "found" and result["detectors"]["spline"]["fires_at"] == result["found_epoch"] == 0.5


def test_the_canvas_probe(tmp_path):
    assert prunectl(*FIND, *AT_1, "--probe", "canvas", "--search-only", "--out", tmp_path).code == 0


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = prunectl(*FIND, *AT_1, "--dry-run")
    document = prunectl(*FIND, *AT_1, "--dry-run", "--json").document
    assert said.code == 0 and "nothing was written" in said.out and list(tmp_path.iterdir()) == []
    assert document["outcome"] == "dry-run" and 0 < document["macs"]["ticket"] < document["macs"]["dense"]
    assert all(g["least"] <= g["after"] <= g["before"] for g in document["groups"])
    least = document["satisfiable"]["target_macs"][0]
    assert 0 < least < document["macs"]["ticket"] / document["macs"]["dense"] and f"--target-macs from {least:.3f}" in said.out
    assert prunectl(*FIND, *AT_1, "--target-macs", f"{least * 1.005:.4f}", "--dry-run").code == 0
    prunectl(*FIND, *AT_1, "--target-macs", f"{least * 0.97:.4f}", "--dry-run").refused(3, "cannot be met", f"{least:.3f}")
    assert {g["name"] for g in document["groups"]} and all(g["after"] <= g["before"] for g in document["groups"])
    assert prunectl("train", "resnet8", "fashion-mini", "--dry-run").code == 0 and list(tmp_path.iterdir()) == []


def test_the_predicted_cost_of_a_dry_run_is_the_tickets(found, tmp_path):
    """Layerwise widths do not hang on the weights, so the plan of the untrained network costs what the ticket does."""
    document = prunectl(*FIND, *AT_1, "--dry-run", "--json", "--out", tmp_path).document
    result = _result(found[0])
    assert (document["params"]["ticket"], document["macs"]["ticket"]) == (result["params"]["ticket"], result["macs"]["ticket"])


# -- networks --------------------------------------------------------------------------------------------------------

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


def test_a_draw_at_once_that_rewinds_waits_for_its_epoch(tmp_path):
    """Weights of epoch 1 are there after epoch 1 only."""
    done = prunectl(*FIND, "--detector", "epoch:0", "--weights", "rewind:1", "--epochs", "2", "--out", tmp_path, "--json")
    assert done.code == 0 and done.document["found_epoch"] == 1, done
