"""`find-ticket` from the command to the reloaded network, and what `show` and `train --from` make of it."""

from __future__ import annotations

import csv
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import AT_1, COMMON_KEYS, FIND, FIND_KEYS, TINY, only_run, prunectl, result_of, run_folders

import prunectl as package
from prunectl import data, models, recipe
from prunectl.errors import CorruptFile
from prunectl.pruning import cost
from prunectl.training import compactmodel


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A finished search that drew after one of two epochs, and what it printed."""
    out = tmp_path_factory.mktemp("found") / "runs"
    printed = prunectl(*FIND, *AT_1, "--out", out, "--json")
    assert printed.code == 0, printed
    return only_run(out), printed


# -- the result ------------------------------------------------------------------------------------------------------


def test_the_document_has_the_promised_keys_and_is_the_result_with_absolute_paths(found):
    run, printed = found
    result = result_of(run)
    assert set(result) == COMMON_KEYS | FIND_KEYS
    assert {k for k in result if printed.document[k] != result[k]} == {"run", "ticket", "compact", "dense"}
    for key in ("ticket", "compact", "dense"):
        assert printed.document[key] == str(run / result[key]) and (run / result[key]).exists()
    assert (result["schema"], result["verb"], result["outcome"], result["run"]) == (1, "find-ticket", "found", run.name)


def test_the_numbers_hang_together(found):
    result = result_of(found[0])
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
    result = result_of(found[0])
    dense, small = result["macs"]["dense"], result["macs"]["ticket"]
    assert result["training_flops"]["dense"] == 6 * dense * 200 * 2
    training = 6 * 200 * (dense + small)
    looked_at = result["training_flops"]["spent"] - training
    assert 0 < looked_at <= 2 * (dense * (256 * 4 + 4000) + small * 200 * 20)


def test_a_teacher_is_paid_for(found, tmp_path):
    done = prunectl(*FIND, *AT_1, "--set", "train.distill=0.5", "--out", tmp_path)
    assert done.code == 0, done
    taught, alone = result_of(only_run(tmp_path)), result_of(found[0])
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
    result, net = result_of(run), package.load(run)
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
    assert abs(100 * right / n - result_of(run)["accuracy"]["final"]) <= 0.5


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
    of_run = result_of(run)
    assert document["params"] == of_run["params"]["ticket"] and document["result"] == of_run
    assert all(document[key] == of_run[key] for key in ("run", "model", "dataset", "versions"))
    assert document["warnings"] == [] and document["wall_s"] > 0
    assert any(layer["before"] != layer["after"] for layer in document["layers"])
    assert sum(layer["params"] for layer in document["layers"]) < document["params"]


def test_show_of_an_unfinished_run_with_a_strange_line(found, tmp_path):
    run = shutil.copytree(found[0], tmp_path / found[0].name)
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"epoch": 3}\n')
    prunectl("show", run).refused(4, "metrics.jsonl", "last line")


@pytest.mark.parametrize("key", ["members", "widths", "dropped", "criterion"])
def test_show_why_of_a_damaged_ticket(found, tmp_path, key):
    run = shutil.copytree(found[0], tmp_path / found[0].name)
    ticket = json.loads((run / "ticket.json").read_text())
    (run / "ticket.json").write_text(json.dumps({k: v for k, v in ticket.items() if k != key}))
    prunectl("show", run, "--why", "conv1").refused(4, "ticket.json", f"no {key}")
    prunectl("show", run / "ticket.json").refused(2, "no saved model", "run folder")


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
    document, of_run = prunectl("show", run, "--why", coupled, "--json").document, result_of(run)
    assert all(document[key] == of_run[key] for key in ("run", "model", "dataset", "seed"))
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
    assert document["params"] == result_of(found[0])["params"]["ticket"]
    assert sum(p.numel() for p in package.load(document["saved"]).parameters()) == document["params"]


def test_several_draws_from_a_saved_network_are_told_as_such(found, tmp_path):
    """What was given is called the start, not dense; of several draws, the first and the last are named."""
    twice = ("--detector", "epoch:0", "--set", "ticket.draws=2", "--set", "ticket.draw_every=0.25", "--sparsity", "0.2")
    done = prunectl(*FIND, "--epochs", 1, "--from", found[0] / "dense", *twice, "--out", tmp_path)
    result = result_of(only_run(tmp_path))
    assert done.code == 0 and result["start"] == str((found[0] / "dense").resolve()) and result["accuracy"]["draws"] == 2
    assert re.search(r"^ +start +ticket", done.out + done.err, re.M)
    assert all(words in done.out + done.err for words in ("validation at the first draw", "right after the last pruning"))


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


def test_a_start_has_the_width_it_has(found, tmp_path):
    argv = ("train", "resnet8", "fashion-mini", "--epochs", 0, "--from", found[0], "--out", tmp_path)
    prunectl(*argv, "--set", "model.width=2").refused(2, "its width is 0.5", "leave model.width = 2 out")
    assert prunectl(*argv).code == 0


def test_a_network_that_is_too_narrow_to_cut_is_told_so(tmp_path):
    prunectl(*FIND, "--set", "model.width=0.1", "--out", tmp_path).refused(3, "conv1 and others have no more than the channels that always")


@pytest.mark.parametrize(
    "argv",
    [
        ("find-ticket", "--criterion", "taylor", "--detector", "epoch:1", "--probe", "canvas"),
        ("find-ticket", "--detector", "epoch:0.5", "--set", "ticket.draws=2", "--set", "ticket.draw_every=0.5", "--set", "train.ema=0.9"),
        ("train",),
        ("sfw-prune", "--constraint", "nm", "--sfw-init", "--sparsity", "0.5", "--set", "sfw.channels=[0.3]"),
    ],
)
def test_test_images_are_read_at_the_end_and_nowhere_else(tmp_path, monkeypatch, argv):
    """Probes, repair, gradients and re-calibration look at training images, what is shown on the way at validation images."""
    read, positions = [], data.Dataset._positions
    monkeypatch.setattr(data.Dataset, "_positions", lambda self, split: read.append(split) or positions(self, split))
    verb, *flags = argv
    done = prunectl(verb, *FIND[1:], "--epochs", "2", *flags, "--out", tmp_path)
    assert done.code == 0, done
    first = read.index("test")
    assert {"val", "train"} & set(read[:first]) and (verb == "sfw-prune" or read[first:] == ["test"])
    logged = (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert read[:first].count("val") >= len(logged) == 2  # both epochs were over


# -- before and beside training ----------------------------------------------------------------------------------------


def test_the_search_is_kept_as_numbers_and_as_a_picture(found):
    run, _ = found
    table = list(csv.DictReader((run / "distances.csv").open(newline="")))
    kept = json.loads((run / "probes.json").read_text())["matrix"]
    assert [float(row["epoch"]) for row in table] == kept["epochs"] and kept["epochs"][-1] == 1.0
    deciding = result_of(run)["detectors"]["spline"]["distances"][-1]["to"]
    assert kept["distances"][-1][-2] == pytest.approx(deciding[0], abs=0.02)  # the matrix samples the units
    assert (run / "search.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("verb", ["train", "find-ticket", "sfw-prune"])
def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch, verb):
    """A set that a run would fetch is planned with from its published numbers, and its place is left alone."""
    monkeypatch.setenv("PRUNECTL_DATA", str(tmp_path / "data"))
    said = prunectl(verb, "resnet8", "cifar10", "--dry-run", "--out", tmp_path / "runs", "--json")
    assert said.code == 0 and list(tmp_path.iterdir()) == [], said
    steps = 45_000 // 128  # a tenth of 50,000 images is carved for validation
    epochs = recipe.resolve(verb, model="resnet8", dataset="cifar10").train.epochs
    assert said.document["training_flops"]["dense"] == 6 * said.document["macs"]["dense"] * steps * 128 * epochs
    assert len(said.document["warnings"]) == 1 and str(tmp_path / "data" / "cifar10") in said.document["warnings"][0]
    assert verb != "find-ticket" or "outputs" in said.document["locked"]["fc"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--detector", "epoch:x"), "epoch:5"),
        (("--detector", "spline:3"), "only epoch"),
        (("--detector", "Epoch:500"), "500"),
        (("--window", "400"), "look 401"),
        (("--detector", "epi", "--epochs", "8"), "look 11"),
        (("--detector", "epi", "--eps", "2"), "less than 1"),
        (("--set", "ticket.probe_images=1"), "probe_images"),
        (("--merge", "--weights", "reinit"), "weights of removed channels"),
        (("--set", "ticket.round_to=true"), "number of channels"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(flags, word):
    prunectl(*FIND, *flags, "--dry-run").refused(2, word)
    prunectl(*FIND, "--detector", "epoch:1", "--eps", "0.1", "--dry-run").refused(2, "leave eps out")


def test_a_dry_run_of_what_cannot_be_downloaded_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNECTL_DATA", str(tmp_path))
    prunectl("find-ticket", "resnet50", "imagenet", "--dry-run").refused(6, "image-net.org", str(tmp_path))


def test_the_predicted_cost_of_a_dry_run_is_the_tickets(found, tmp_path):
    """Layerwise widths do not hang on the weights, so the plan of the untrained network costs what the ticket does."""
    document = prunectl(*FIND, *AT_1, "--dry-run", "--json", "--out", tmp_path).document
    result = result_of(found[0])
    assert (document["params"]["ticket"], document["macs"]["ticket"]) == (result["params"]["ticket"], result["macs"]["ticket"])
