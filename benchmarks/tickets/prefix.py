"""The dense epochs before the draw, trained once for all arms of one network, seed and search.

Arms that differ in what is removed and in what follows train the same network up to the draw, bit for bit (test_evidence.py). So
the search runs once by itself, `find-ticket --search-only`, and each arm's run begins at its last checkpoint, as a resumed run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from benchmarks.cells import Cell, answer, folder_of, hand_over
from benchmarks.tickets.cells import AFTER_TRAINING

SEARCH = ("--detector", "--eps", "--window", "--sparsity")  # flags that decide what a search sees and when it ends
SETTINGS = ("ticket.probe", "ticket.code", "ticket.detector", "train.", "data.")  # and settings


def lend(cell: Cell, runs: str) -> None:
    """Puts the checkpoint of the cell's search into its run folder, unless that folder has begun or there is no search."""
    if cell.verb != "find-ticket" or cell.program == AFTER_TRAINING or "--detector epoch:0" in " ".join(cell.options):
        return
    target = folder_of(cell, runs)
    if not target.exists():
        search = replace(cell, options=searching(cell.options), program="prunectl")
        hand_over(Path(answer(search, str(Path(runs) / "searches"))["run"]), target)


def searching(options: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the options that the search depends on, and --search-only."""
    pairs = [(a, b) for a, b in itertools.pairwise(options) if a in SEARCH or (a == "--set" and b.startswith(SETTINGS))]
    return (*(word for pair in pairs for word in pair), "--search-only")
