"""The same run on a terminal, in a pipe, quietly and with JSON."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from running import TINY, prunectl

from prunectl.console import Console
from prunectl.report.search import plot_search
from prunectl.report.sweep import plot_sweep
from prunectl.workflows import demo

TRAIN = ("train", "resnet8", "fashion-mini", *TINY, "--epochs", 1)


def test_in_a_pipe_there_are_no_bars_and_no_control_characters(tmp_path):
    done = prunectl(*TRAIN, "--out", tmp_path)
    assert done.code == 0 and done.err == ""
    assert not set("\x1b\r\b") & set(done.out)
    assert done.out.count("epoch   1/1") == 1 and "test accuracy" in done.out


def test_quiet_says_nothing_and_verbose_more(tmp_path):
    quiet = prunectl(*TRAIN, "--out", tmp_path / "q", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert json.loads(prunectl(*TRAIN, "--out", tmp_path / "q", "--quiet", "--json").out)["outcome"] == "trained"
    find = ("find-ticket", *TRAIN[1:], "--detector", "epoch:1", "--search-only")
    plain, verbose = (prunectl(*find, *flags, "--out", tmp_path / str(len(flags))).out for flags in ((), ("-v",)))
    assert len(verbose.splitlines()) > len(plain.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "bars"), [((), True), (("--no-progress",), False)])
def test_on_a_terminal_there_is_a_bar_that_leaves_no_trace(tmp_path, flags, bars):
    leader, follower = pty.openpty()
    env = {**{k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")}, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "prunectl", *map(str, TRAIN), "--out", str(tmp_path), *flags]
    child = subprocess.Popen(command, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the child closed its end
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert child.wait(60) == 0
    assert (b"left" in shown) == bars and b"test accuracy" in shown


def test_pictures_take_any_name(tmp_path):
    """matplotlib would read what stands between two dollar signs as a formula."""
    title = "resnet8 on US$_vs_$_{set"
    row = {"sparsity": 0.5, "accuracy_raw": 50.0, "accuracy_bn_recalibrated": None}
    plot_sweep(tmp_path / "sweep.png", [row], dense=90.0, title=title, split="test")
    plot_search(tmp_path / "search.png", {}, [0.5], [[0.0]], drawn=0.5, eps=None, title=title)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["search.png", "sweep.png"]


def test_without_a_ticket_its_column_is_empty(tmp_path, capsys):
    nothing = {"dense_at_draw": None, "raw": None, "bn_recalibrated": None, "final": 87.5}
    search = {
        "outcome": "not-found",
        "found_epoch": None,
        "accuracy": nothing,
        "run": "b",
        "training_flops": {"dense": 1e12, "spent": 1.1e12},
    }
    search |= {"params": {"dense": 78000, "ticket": None}, "macs": {"dense": 9e6, "ticket": None}}
    dense = {"epochs": 12, "accuracy": {"top1": 88.0}, "params": 78000, "macs": 9e6, "run": "a"}
    timed = {"reports": [{"latency_ms": {"p50": 0.1}}] * 2, "ratios": [{"metric": "latency_ms", "median": 1.0}]}
    exported = {"dense": {"accuracy": 88.0}, "ticket": {"accuracy": 87.5}}
    demo.show(
        {"train": dense, "find_ticket": search, "export": exported, "bench": timed, "files": {"dense": 1, "ticket": None}},
        Console(),
        tmp_path,
    )
    said = capsys.readouterr().out
    assert "no ticket found" in said and "88.00" in said and "87.5" not in said and "1.1 T" not in said
