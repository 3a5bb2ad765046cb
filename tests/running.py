"""The real command line, run three ways: in this process (fast), in a forked child that can be killed or dies by itself at
a chosen write, and as the installed program (for what only a whole process shows: signals, a terminal, torchrun).

Children come from a fork server that has imported torch once, so that each costs a fraction of a second."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["prunectl.cli", "prunectl.recipe", "prunectl.workflows.find_ticket", "prunectl.workflows.train", "torch._dynamo"]
)
TINY = ("--set", "model.width=0.5", "--set", "data.train_images=200", "--set", "data.val_fraction=0.02", "--set", "train.batch_size=50")
FIND = ("find-ticket", "resnet8", "fashion-mini", *TINY)
AT_1 = ("--epochs", "2", "--detector", "epoch:1")
COMMON_KEYS = {"schema", "verb", "run", "outcome", "model", "dataset", "seed", "wall_s", "versions", "warnings"}
FIND_KEYS = {"found_epoch", "distances", "detectors", "accuracy", "params", "macs", "training_flops", "ticket", "compact", "dense"}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document that stdout must be."""
        value: dict[str, Any] = json.loads(self.out)
        return value

    def refused(self, code: int, *words: str) -> None:
        """Ended with `code` and one sentence on stderr that has all `words`; nothing on stdout, no traceback."""
        lines = self.err.strip().splitlines()
        assert (self.code, len(lines)) == (code, 1), self
        assert self.err.startswith("error: ") and "Traceback" not in self.err and "internal error" not in self.err, self
        assert all(word in self.err for word in words), self
        assert self.out == "", self


def prunectl(*argv: object) -> Outcome:
    """One command in this process."""
    from prunectl.cli.process import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


def installed(*argv: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 280) -> Outcome:
    """One command as `python -m prunectl` in a process of its own."""
    command = [sys.executable, "-m", "prunectl", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(*argv: object, log: Path, die_at_write: int = 0) -> Any:
    """One command in a child that is left running; its output goes to the file `log`.

    die_at_write: the child ends as by SIGKILL just before the n-th file would be renamed into its place."""
    child = FORKS.Process(target=_child, args=([str(a) for a in argv], str(log), die_at_write), daemon=True)
    child.start()
    return child


def forked(*argv: object, log: Path, die_at_write: int = 0) -> Outcome:
    """As `start`, waited for; stdout and stderr together in `out`."""
    child = start(*argv, log=log, die_at_write=die_at_write)
    child.join(240)
    assert child.exitcode is not None, "the command did not end"
    return Outcome(child.exitcode, log.read_text(encoding="utf-8"), "")


def _child(argv: list[str], log: str, die_at_write: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if die_at_write:
        _die_at(die_at_write)
    from prunectl.cli.process import run

    code = run(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_at(n: int) -> None:
    rename, left = os.replace, [n]

    def counted(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(137)
        rename(*args, **kwargs)

    os.replace = counted  # type: ignore[assignment]


def only_run(out: Path) -> Path:
    """The one run folder below `out`."""
    (found,) = [p for p in out.iterdir() if p.is_dir() and not p.is_symlink()]
    return found


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text()))


def search_only(out: Path, *flags: object) -> Path:
    """The run folder of a search that ended at its draw, after one epoch."""
    done = prunectl(*FIND, *AT_1, "--search-only", "--out", out, *flags)
    assert done.code == 0, done
    return only_run(out)


def run_folders(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir()) if out.is_dir() else []


def comparable(run: Path) -> dict[str, Any]:
    """What two runs that did the same must agree on, bit for bit: weights, metrics and result, times left out."""
    timed = ("seconds", "images_per_s", "wall_s", "warnings")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    weights = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("*/model.safetensors"))}
    assert weights
    return {
        "weights": weights,
        "metrics": [{k: v for k, v in row.items() if k not in timed} for row in rows],
        "result": {k: v for k, v in result.items() if k not in timed},
    }
