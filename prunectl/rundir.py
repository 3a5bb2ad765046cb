"""Every file name of a run, and every rule about writing one: atomically, by one process at a time, never half.

runs/<verb>-<model>-<dataset>-<digest>/
    recipe.yaml  run.json      what was asked, by which command, versions and hardware
    metrics.jsonl  metrics.csv one line an epoch
    checkpoints/               the two newest, see training.checkpoint
    ticket.json  probes.json  probes.csv
    dense/  compact/  model/   networks: plan.json + model.safetensors
    result.json                written last: a run with it is finished and answers from disk
`runs/latest` points at the newest run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import CorruptFile, RunFolderError
from prunectl.files import UNFINISHED, write_csv, write_text

MARKER = "recipe.yaml"  # what tells a run folder from any other folder


@dataclass(frozen=True)
class RunDir:
    """A run's folder. replaced: what it holds is to be thrown away by `clear` once this run begins, and not before."""

    path: Path
    replaced: bool = False

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ticket(self) -> Path:
        return self.path / "ticket.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def finished(self) -> bool:
        return self.result.is_file() and not self.replaced

    def read_result(self) -> dict[str, Any]:
        return read_json(self.result)

    def log(self, rows: list[dict[str, Any]]) -> None:
        """metrics.jsonl and its CSV twin, whole: a run of hundreds of epochs is a few hundred kilobytes."""
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for r in rows))
        write_csv(self.path / "metrics.csv", rows)


def read_json(path: Path) -> dict[str, Any]:
    """Raises CorruptFile."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CorruptFile(f"{path} cannot be read as JSON ({e}); run the command again with --overwrite") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{path} holds no JSON object; run the command again with --overwrite")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@contextmanager
def opened(out: Path, name: str, *, resume: bool, overwrite: bool) -> Iterator[RunDir]:
    """The run folder, made if need be and locked for the block; the lock dies with its process.

    Raises RunFolderError when another process holds it, when it holds an unfinished run and neither flag is given,
    when the path is in use for something else, and when it cannot be written."""
    run = RunDir(out / name, replaced=overwrite)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = (run.path / ".lock").open("a+")
    except OSError as e:
        if run.finished:
            yield run  # of a finished run only the result is read
            return
        raise RunFolderError(f"run folder {run.path} cannot be written: {e.strerror or e}; choose another with --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise RunFolderError(
                f"run folder {run.path} is in use by process {lock.read().strip() or '?'}; wait, or change --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _check_state(run, resume=resume)
        yield run


def _check_state(run: RunDir, *, resume: bool) -> None:
    contents = {p.name for p in run.path.iterdir() if p.name != ".lock" and not p.name.endswith(UNFINISHED)}
    if contents and not run.recipe.is_file():
        raise RunFolderError(f"{run.path} exists and is no run folder (it has no {MARKER}); move it away or change --out")
    for left_by_a_crash in run.path.rglob(f".*{UNFINISHED}"):
        left_by_a_crash.unlink()
    begun = contents - {run.recipe.name, run.info.name}  # these two say what was asked for: nothing is lost with them
    if begun and not (run.finished or resume or run.replaced):
        raise RunFolderError(f"{run.path} holds an unfinished run: add --resume to go on with it or --overwrite to start again")


def clear(run: RunDir) -> None:
    """Throws away what the folder holds: first what makes it finished, last what makes it a run folder."""
    for p in sorted(run.path.iterdir(), key=lambda p: (p == run.recipe) - (p == run.result)):
        if p.name != ".lock":
            shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()


def point_latest(run: RunDir) -> None:
    """`latest` beside the run points at it."""
    link, fresh = run.path.parent / "latest", run.path.parent / f".latest.{os.getpid()}"
    if link.exists() and not link.is_symlink():
        return  # a user's own file of that name is left alone
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run.path.name)
    os.replace(fresh, link)


def find(path: Path) -> RunDir:
    """The run folder at `path`. Raises RunFolderError when it is none."""
    if not path.exists():
        hint = "; no run was made here yet" if path.name == "latest" else ""
        raise RunFolderError(f"there is no run at {path}{hint}")
    run = RunDir(path.resolve())
    if not run.recipe.is_file():
        raise RunFolderError(f"{path} is no run folder: it has no {MARKER}")
    return run


def discard_if_empty(run: RunDir, made_for_it: Sequence[Path] = ()) -> None:
    """Removes a run folder in which nothing was written but its lock, and then, innermost first, what folders were made for it."""
    if run.path.is_dir() and {p.name for p in run.path.iterdir()} <= {".lock"}:
        shutil.rmtree(run.path, ignore_errors=True)
        with suppress(OSError):  # by now another run's
            for folder in made_for_it:
                folder.rmdir()
