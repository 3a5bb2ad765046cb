"""A run that is interrupted, killed or starved and then resumed ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import comparable, forked, only_run, prunectl, run_folders, start

import prunectl as package
from prunectl.console import Console
from prunectl.errors import Interrupted, UsageError
from prunectl.recipe import resolve
from prunectl.training.checkpoint import newest
from prunectl.workflows.find_ticket import find_ticket
from prunectl.workflows.folder import Options
from prunectl.workflows.train import train

EPOCHS = 4
SMALL = ["model.width=0.5", "data.train_images=300", "data.val_fraction=0.02", "train.batch_size=50", f"train.epochs={EPOCHS}"]
# two draws in the middle of epochs, so that a crash before, between and after them is met
SETTINGS = {
    "train": [*SMALL, "train.ema=0.9"],
    "find-ticket": [
        *SMALL,
        "ticket.detector=epoch:1.5",
        "ticket.probes_per_epoch=2",
        "ticket.draws=2",
        "train.ema=0.9",
        "train.distill=0.5",
    ],
}
WORKFLOWS = {"train": train, "find-ticket": find_ticket}
VERBS = list(SETTINGS)


def _command(verb: str, out: Path, *flags: str) -> list[str]:
    sets = [part for setting in SETTINGS[verb] for part in ("--set", setting)]
    return [verb, "resnet8", "fashion-mini", *sets, "--out", str(out), *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Verb -> the run folder of a run that nothing happened to."""
    runs = {}
    for verb in VERBS:
        out = tmp_path_factory.mktemp(verb)
        done = forked(*_command(verb, out), log=out.parent / f"{verb}.log")
        assert done.code == 0, done.out
        runs[verb] = only_run(out)
    return runs


def _must_equal(run: Path, reference: Path) -> None:
    got, expected = comparable(run), comparable(reference)
    assert got["metrics"] == expected["metrics"]
    assert got["result"] == expected["result"]
    assert got["weights"].keys() == expected["weights"].keys()
    assert [name for name, data in expected["weights"].items() if got["weights"][name] != data] == []
    assert list(run.rglob("*.tmp")) == []


class _Impatient(Console):
    """Someone who presses Ctrl-C when the line of an epoch appears."""

    at: str = ""

    def say(self, text: str) -> None:
        if text.startswith(self.at):
            raise KeyboardInterrupt


@pytest.mark.parametrize(("verb", "epoch"), [("train", 2), ("find-ticket", 1), pytest.param("find-ticket", EPOCHS, marks=pytest.mark.slow)])
def test_interrupted_at_an_epochs_end(verb, epoch, undisturbed, tmp_path):
    recipe = resolve(verb, model="resnet8", dataset="fashion-mini", sets=SETTINGS[verb])
    ui = _Impatient()
    ui.at = f"epoch   {epoch}/"
    with pytest.raises(Interrupted, match=f"everything up to epoch {epoch - 1} of {EPOCHS} is saved.*--resume"):
        WORKFLOWS[verb](recipe, Options(out=tmp_path), ui)
    resumed = prunectl(*_command(verb, tmp_path, "--resume"))
    assert resumed.code == 0 and f"after epoch {epoch - 1}" in resumed.out
    _must_equal(only_run(tmp_path), undisturbed[verb])


def _wait_for(path: Path, child) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert child.is_alive() and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize(("verb", "sent"), [("train", signal.SIGINT), ("find-ticket", signal.SIGTERM)])
def test_ctrl_c_and_sigterm_save_say_so_and_end_in_130(verb, sent, undisturbed, tmp_path):
    log, run = tmp_path / "log", tmp_path / "runs" / undisturbed[verb].name
    child = start(*_command(verb, tmp_path / "runs"), log=log)
    _wait_for(run / "checkpoints" / "epoch-00001.json", child)
    os.kill(child.pid, sent)
    child.join(60)
    said = log.read_text()
    assert child.exitcode == 130, said
    assert said.count("error: interrupted: everything up to epoch") == 1 and "--resume" in said and "Traceback" not in said
    assert run_folders(tmp_path / "runs") == sorted([run.name, "latest"])
    assert prunectl(*_command(verb, tmp_path / "runs", "--resume")).code == 0
    _must_equal(run, undisturbed[verb])


def test_an_impatient_ctrl_c(undisturbed, tmp_path):
    """Pressed again and again while the first one is being answered."""
    run = tmp_path / "runs" / undisturbed["train"].name
    command = [sys.executable, "-m", "prunectl", *map(str, _command("train", tmp_path / "runs"))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while not (run / "checkpoints" / "epoch-00001.json").exists():
            assert child.poll() is None
            time.sleep(0.01)
        while child.poll() is None:
            child.send_signal(signal.SIGINT)
            time.sleep(0.02)
        said = child.stderr.read()
    assert child.returncode == 130 and len(said.splitlines()) == 1 and "is saved" in said, said


def _kill_and_resume(verb: str, out: Path, reference: Path, kills: int, seed: int) -> None:
    """SIGKILL `kills` times at random moments, resuming each time; a run that reaches its end in between begins again.

    A moment is a random while after the start or after the next checkpoint, however fast this machine is just now."""
    rng, run, log = random.Random(seed), out / reference.name, out.parent / "log"
    struck = 0
    for _ in range(4 * kills):
        found, _passed_over = newest(run / "checkpoints")
        child = start(*_command(verb, out, "--resume"), log=log)
        if rng.random() < 0.8:
            _wait_for(run / "checkpoints" / f"epoch-{min(EPOCHS, found.epoch + 1 if found else 1):05d}.json", child)
        child.join(rng.uniform(0, 0.4))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), log.read_text()
        struck += child.exitcode != 0
        if struck == kills:
            break
        if (run / "result.json").is_file():
            _must_equal(run, reference)
            shutil.rmtree(run)
    assert struck == kills
    done = forked(*_command(verb, out, "--resume"), log=log)
    assert done.code == 0, done.out
    _must_equal(run, reference)


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random_moments(verb, undisturbed, tmp_path):
    _kill_and_resume(verb, tmp_path / "runs", undisturbed[verb], kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_twenty_random_moments(verb, undisturbed, tmp_path):
    _kill_and_resume(verb, tmp_path / "runs", undisturbed[verb], kills=20, seed=1)


def _dies_at(write: int, verb: str, undisturbed, tmp_path) -> bool:
    """Whether the run had that many writes; if so it died just before that one, was resumed, and must have ended right."""
    out, log = tmp_path / f"runs-{write}", tmp_path / f"log-{write}"
    died = forked(*_command(verb, out), log=log, die_at_write=write)
    assert died.code in (0, 137), died.out
    resumed = forked(*_command(verb, out, "--resume"), log=log)
    assert resumed.code == 0, (write, resumed.out)
    _must_equal(only_run(out), undisturbed[verb])
    return died.code == 137


@pytest.mark.parametrize("write", [1, 7])  # the recipe; the record of the first checkpoint, its tensors just written
def test_dying_at_the_first_writes(write, undisturbed, tmp_path):
    assert _dies_at(write, "train", undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", VERBS)
def test_dying_at_every_write(verb, undisturbed, tmp_path):
    write = 1
    while _dies_at(write, verb, undisturbed, tmp_path):
        write += 1
    assert write > 4 * EPOCHS


def _interrupted_after(verb: str, epoch: int, out: Path) -> Path:
    ui = _Impatient()
    ui.at = f"epoch   {epoch + 1}/"
    with pytest.raises(Interrupted):
        WORKFLOWS[verb](resolve(verb, model="resnet8", dataset="fashion-mini", sets=SETTINGS[verb]), Options(out=out), ui)
    return only_run(out)


def test_a_spoilt_checkpoint_costs_an_epoch_and_a_warning(undisturbed, tmp_path):
    run = _interrupted_after("find-ticket", 3, tmp_path)
    path = run / "checkpoints" / "epoch-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    resumed = prunectl(*_command("find-ticket", tmp_path, "--resume", "--json"))
    assert resumed.code == 0 and "warning: checkpoint epoch-00003.safetensors is damaged" in resumed.err
    assert len(resumed.document["warnings"]) == 1 and "epoch 2" in resumed.document["warnings"][0]
    _must_equal(run, undisturbed["find-ticket"])


def test_what_was_warned_of_before_an_interruption_is_in_the_result(tmp_path, monkeypatch):
    """That this budget takes widths in multiples of less than 8 is said when the ticket is drawn, before the interruption."""
    monkeypatch.setitem(SETTINGS, "find-ticket", [*SMALL, "model.width=0.5", "ticket.sparsity=0.4", "ticket.detector=epoch:0.5"])
    _interrupted_after("find-ticket", 1, tmp_path)
    resumed = prunectl(*_command("find-ticket", tmp_path, "--resume", "--json"))
    assert resumed.code == 0 and "multiples of" not in resumed.err
    assert ["multiples of" in w for w in resumed.document["warnings"]] == [True]


def test_when_every_checkpoint_is_spoilt_it_begins_again_and_says_so(undisturbed, tmp_path):
    run = _interrupted_after("train", 2, tmp_path)
    for path in run.glob("checkpoints/*.safetensors"):
        path.write_bytes(b"")
    again = _Impatient()
    again.at = "epoch   1/"
    with pytest.raises(Interrupted, match=r"everything up to epoch 0 .* is saved"):  # what is saved now is newer than what was spoilt
        train(resolve("train", model="resnet8", dataset="fashion-mini", sets=SETTINGS["train"]), Options(out=tmp_path, resume=True), again)
    assert len(again.warnings) == 2
    assert prunectl(*_command("train", tmp_path, "--resume")).code == 0
    _must_equal(run, undisturbed["train"])


def test_an_unfinished_run_is_no_network_yet(tmp_path):
    """The dense network of its draw lies in the folder, and is not what the run is for."""
    run = _interrupted_after("find-ticket", 3, tmp_path)
    assert (run / "dense" / "plan.json").is_file()
    with pytest.raises(UsageError, match="unfinished"):
        package.load(run)
    assert package.load(run / "dense") is not None
    assert prunectl("show", run, "--json").document["outcome"] == "unfinished"
    failed = prunectl("train", "resnet8", "fashion-mini", "--from", run, "--out", tmp_path / "other")
    failed.refused(2, "unfinished", "--resume")


def test_a_lost_log_is_written_anew(undisturbed, tmp_path):
    run = _interrupted_after("train", 2, tmp_path)
    for name in ("metrics.jsonl", "metrics.csv"):
        (run / name).unlink()
    assert prunectl(*_command("train", tmp_path, "--resume")).code == 0
    _must_equal(run, undisturbed["train"])


def test_training_from_latest_resumes_from_what_latest_was(undisturbed, tmp_path):
    """As soon as the new run begins, `latest` is the new run."""
    shutil.copytree(undisturbed["find-ticket"], tmp_path / "cut" / "ticket")
    shutil.copytree(undisturbed["find-ticket"], tmp_path / "whole" / "ticket")
    for out in (tmp_path / "cut", tmp_path / "whole"):
        (out / "latest").symlink_to("ticket")
    (tmp_path / "start").symlink_to(tmp_path / "cut" / "ticket")
    sets = [part for setting in SETTINGS["train"] for part in ("--set", setting)]
    argv = ["train", "resnet8", "fashion-mini", *sets, "--from", str(tmp_path / "cut" / "latest"), "--out"]
    whole = prunectl(*argv, tmp_path / "whole", "--json")
    died = forked(*argv, tmp_path / "cut", log=tmp_path / "log", die_at_write=14)
    assert died.code == 137 and (tmp_path / "cut" / "latest").resolve().name != "ticket"
    argv[argv.index("--from") + 1] = str(tmp_path / "start")  # the same run by another name
    resumed = prunectl(*argv, tmp_path / "cut", "--resume")
    assert resumed.code == 0 and "resumed" in resumed.out, resumed
    name = Path(whole.document["run"]).name
    _must_equal(tmp_path / "cut" / name, tmp_path / "whole" / name)


NETWORK = """
from torch import nn
def net(num_classes, in_channels):
    c = CHANNELS
    return nn.Sequential(nn.Conv2d(in_channels, c, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes))
"""


def test_a_users_network_that_changed_meanwhile(tmp_path):
    file = tmp_path / "nets.py"
    file.write_text(NETWORK.replace("CHANNELS", "8"))
    argv = ["train", f"{file}:net", "fashion-mini", "--epochs", 3, "--set", "data.train_images=100", "--out", tmp_path / "runs"]
    assert forked(*argv, log=tmp_path / "log", die_at_write=12).code == 137
    file.write_text(NETWORK.replace("CHANNELS", "12"))
    failed = prunectl(*argv, "--resume")
    assert (
        failed.code == 2 and "do not fit" in failed.err and "--overwrite" in failed.err and failed.err.count("\n") == 2
    )  # a warning before it


def test_other_images_are_refused_and_another_format_is_said(tmp_path):
    """A photo less, and all parts are drawn anew: what is validated on would have been trained on."""
    for place in (f"{split}/{name}/{k}.png" for split, n in (("train", 30), ("val", 4)) for name in ("cat", "dog") for k in range(n)):
        (tmp_path / "pets" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (3 * len(place), 7, 9)).save(tmp_path / "pets" / place)
    sets = [*SMALL[:1], "train.epochs=3", "train.batch_size=10", "train.precision=fp32"]
    recipe, ui = resolve("train", model="resnet8", dataset=str(tmp_path / "pets"), sets=sets), _Impatient()
    ui.at = "epoch   2/"
    with pytest.raises(Interrupted):
        train(recipe, Options(out=tmp_path / "runs"), ui)
    gone = tmp_path / "pets" / "train" / "cat" / "3.png"
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(UsageError, match=r"images of pets are not those.*--overwrite"):
        train(recipe, Options(out=tmp_path / "runs", resume=True), Console())
    gone.write_bytes(content)
    info = only_run(tmp_path / "runs") / "run.json"
    info.write_text(info.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    result = train(recipe, Options(out=tmp_path / "runs", resume=True), Console())
    assert result["warnings"] == ["this run began with precision bf16 and goes on with fp32: its result is of both"]


def test_a_start_that_was_validated_on_other_images_is_said(undisturbed, tmp_path):
    argv = (*_command("train", tmp_path, "--from", undisturbed["train"], "--epochs", "0")[:3], "--from", undisturbed["train"])
    words = (*argv, "--epochs", 0, "--out", tmp_path, "--json")
    assert prunectl(*words, "--set", "data.val_fraction=0.02").document["warnings"] == []
    (said,) = prunectl(*words, "--set", "data.val_fraction=0.1").document["warnings"]
    assert "was trained on some of them" in said


def test_an_unfinished_run_asks_what_to_do_and_overwrite_begins_again(undisturbed, tmp_path):
    run = _interrupted_after("train", 1, tmp_path)
    prunectl(*_command("train", tmp_path)).refused(2, "unfinished", "--resume", "--overwrite")
    assert prunectl(*_command("train", tmp_path, "--overwrite")).code == 0
    _must_equal(run, undisturbed["train"])


def test_a_network_that_changed_under_a_finished_or_fitting_run_is_noticed(tmp_path):
    """A finished run has the result of what was in the file, an unfinished one was trained with it."""
    file = tmp_path / "nets.py"
    file.write_text(NETWORK.replace("CHANNELS", "8"))
    argv = ("train", f"{file}:net", "fashion-mini", "--epochs", 1, "--set", "data.train_images=100", "--out", tmp_path / "runs")
    assert prunectl(*argv).code == 0 and "changed" not in prunectl(*argv).err
    file.write_text(NETWORK.replace("CHANNELS", "8") + "# another line")
    again = prunectl(*argv, "--json")
    assert again.code == 0 and "--overwrite runs it again" in again.err and any(str(file) in w for w in again.document["warnings"])
    (only_run(tmp_path / "runs") / "result.json").unlink()
    assert "is not what it was when this run began" in prunectl(*argv, "--resume").err


def test_a_finished_run_answers_from_disk(undisturbed):
    run = undisturbed["train"]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    for flags in ((), ("--resume",)):
        answer = prunectl(*_command("train", run.parent, *flags, "--json"))
        assert answer.code == 0 and "is finished" in answer.err
        assert {**answer.document, "run": run.name, "saved": "model"} == json.loads((run / "result.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_a_refused_overwrite_keeps_the_old_run(undisturbed):
    run = undisturbed["train"]
    assert prunectl(*_command("train", run.parent, "--overwrite", "--device", "cuda")).code == 5
    assert (run / "result.json").is_file() and (run / "model" / "model.safetensors").is_file()


def test_resuming_nothing_begins_and_says_so(tmp_path):
    fresh = prunectl("train", "resnet8", "fashion-mini", "--epochs", 1, "--set", "data.train_images=100", "--out", tmp_path, "--resume")
    assert fresh.code == 0 and "nothing to resume" in fresh.out and "from the beginning" in fresh.out


def test_two_processes_on_one_run(undisturbed, tmp_path):
    name = undisturbed["train"].name
    child = start(*_command("train", tmp_path), log=tmp_path.parent / "log")
    _wait_for(tmp_path / name / "run.json", child)
    for flags in ((), ("--resume",), ("--overwrite",)):
        prunectl(*_command("train", tmp_path, *flags)).refused(2, f"in use by process {child.pid}")
    child.join(120)
    assert child.exitcode == 0
    _must_equal(tmp_path / name, undisturbed["train"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_loss_that_is_not_finite_ends_in_4_and_names_a_checkpoint_without_nan(verb, tmp_path):
    sets = [part for s in (*SMALL, "train.lr=1e18", "train.warmup_epochs=0") for part in ("--set", s)]
    failed = prunectl(verb, "resnet8", "fashion-mini", *sets, "--out", tmp_path)
    assert failed.code == 4 and "Traceback" not in failed.err
    assert failed.err.count("\n") == 1 and "finite" in failed.err and "train.lr" in failed.err and "last good checkpoint" in failed.err
    found, _ = newest(only_run(tmp_path) / "checkpoints")
    assert found is not None and f"epoch {found.epoch} in" in failed.err
    assert all(t.isfinite().all() for t in found.tensors.values() if t.is_floating_point())
    assert not (only_run(tmp_path) / "result.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where the system lets us mount one: enough to begin, too little for the whole run."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(small_disk, undisturbed):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(60_000))
    failed = prunectl(*_command("find-ticket", small_disk))
    assert failed.code == 2 and failed.err.count("\n") == 1, failed
    assert "disk is full" in failed.err and "--resume" in failed.err and "Traceback" not in failed.err
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert prunectl(*_command("find-ticket", small_disk, "--resume")).code == 0
    _must_equal(only_run(small_disk), undisturbed["find-ticket"])


def test_a_disk_full_from_the_start_leaves_one_sentence(small_disk):
    with (small_disk / "ballast").open("wb", buffering=0) as f, contextlib.suppress(OSError):
        while f.write(bytes(4096)):
            pass
    failed = prunectl(*_command("train", small_disk / "runs"))
    assert failed.code == 2 and failed.err.count("\n") == 1 and ("full" in failed.err or "No space" in failed.err), failed


def test_different_thread_counts_are_not_promised_to_agree():
    """The promise holds for one thread count; conftest pins it for these tests."""
    assert torch.get_num_threads() == 1
