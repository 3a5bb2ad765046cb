"""The same run on a terminal, in a pipe, quietly and with JSON."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from running import TINY, prunectl

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
