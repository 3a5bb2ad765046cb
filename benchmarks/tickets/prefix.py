"""The dense epochs before the draw, trained once for all arms of one network, seed and search.

Arms that differ in what is removed and in what follows train the same network up to the draw, bit for bit (test_evidence.py). So
the search runs once by itself, `find-ticket --search-only`, and each arm's run begins at its last checkpoint, as a resumed run."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell

SEARCH = ("--detector", "--eps", "--window", "--sparsity")  # flags that decide what a search sees and when it ends
SETTINGS = ("ticket.probe", "ticket.code", "ticket.detector", "train.")  # and settings


def lend(cell: Cell, runs: str) -> None:
    """Puts the checkpoint of the cell's search into its run folder, unless that folder has begun or there is no search."""
    if cell.verb != "find-ticket" or "--detector epoch:0" in " ".join(cell.options):
        return
    target = Path(runs) / _answer(cell, runs, "--dry-run")["run"]
    if (target / "checkpoints").exists():
        return
    search = replace(cell, options=searching(cell.options), program="prunectl")
    source = Path(_answer(search, str(Path(runs) / "searches"))["run"])
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "recipe.yaml", target)  # marks a run folder; the cell writes its own over it
    shutil.copytree(source / "checkpoints", target / "checkpoints")


def searching(options: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the options that the search depends on, and --search-only."""
    pairs = [(a, b) for a, b in itertools.pairwise(options) if a in SEARCH or (a == "--set" and b.startswith(SETTINGS))]
    return (*(word for pair in pairs for word in pair), "--search-only")


def _answer(cell: Cell, runs: str, *flags: str) -> dict[str, Any]:
    _, *arguments = cell.command(runs)
    done = subprocess.run([sys.executable, "-m", cell.program, *arguments, *flags], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"the search of {cell.name}: exit {done.returncode}")
    return dict(json.loads(done.stdout))
