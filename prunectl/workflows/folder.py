"""The run folder of a workflow for as long as it runs: locked, named when it is interrupted, and answering when it is finished."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl import dist
from prunectl.console import Console
from prunectl.errors import Interrupted, PrunectlError, RunFolderError
from prunectl.recipe import Recipe
from prunectl.rundir import RunDir, discard_if_empty, opened
from prunectl.training import checkpoint
from prunectl.training.loop import Diverged
from prunectl.training.precision import place
from prunectl.workflows.provenance import changed


@dataclass(frozen=True)
class Options:
    """What a run is given that does not decide its result."""

    out: Path = Path("runs")
    device: str = "auto"
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False
    download: bool = True


@contextmanager
def run_folder(recipe: Recipe, options: Options) -> Iterator[RunDir]:
    """The recipe's run folder, locked by rank 0, and the process group of all ranks, for as long as the run lasts.

    Ctrl-C and SIGTERM end in Interrupted, a diverged loss in Diverged; both name what is saved."""
    with dist.group(place(options.device, recipe.train.precision).device), _opened(recipe, options) as run, _sigterm_as_ctrl_c():
        try:
            yield run
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {_saved(run, recipe)}") from None
        except Diverged as e:
            raise Diverged(f"{e}; the last good checkpoint is that of epoch {_saved_epoch(run)} in {run.checkpoints}") from None


@contextmanager
def _opened(recipe: Recipe, options: Options) -> Iterator[RunDir]:
    if dist.rank() != 0:
        if not dist.told(False):
            raise RunFolderError("the first process refused the run folder")
        yield RunDir(options.out / recipe.run_name, replaced=options.overwrite)
        return
    made = [folder for folder in (options.out, *options.out.parents) if not folder.exists()]
    with ExitStack() as held:
        try:
            run = held.enter_context(opened(options.out, recipe.run_name, resume=options.resume, overwrite=options.overwrite))
        except PrunectlError:
            dist.told(False)
            raise
        dist.told(True)
        held.callback(discard_if_empty, run, made)  # refused before anything began: leave no folder behind
        yield run


def from_disk(run: RunDir, ui: Console) -> dict[str, Any]:
    """The result of a finished run."""
    result = run.read_result()
    for file in changed(run):
        ui.warn(f"{file} has changed since {run.path} was made: this is the result with the other; --overwrite runs it again")
    ui.say(f"{run.path} is finished: this is its result; --overwrite would run it again")
    return {**result, "warnings": [*result["warnings"], *ui.warnings]}


def _saved_epoch(run: RunDir) -> int | None:
    found, _ = checkpoint.newest(run.checkpoints)
    return found.epoch if found else None


def _saved(run: RunDir, recipe: Recipe) -> str:
    epoch = _saved_epoch(run)
    if epoch is None:
        return "nothing was saved yet; give the same command again"
    return f"everything up to epoch {epoch} of {recipe.train.epochs} is saved in {run.path}; go on with the same command and --resume"


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A batch system's SIGTERM ends a run as Ctrl-C does; only a main thread may set handlers."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would only disturb the ending
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
