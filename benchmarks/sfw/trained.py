"""One training for two judgements: what is judged on validation images is the very network that is judged on test images.

Both cells of an arm and seed train the same, on the same images, and differ only in what they sweep on."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cells import Cell, folder_of, hand_over


def lend(cell: Cell, runs: str) -> None:
    """Puts the trained network of the cell's twin, where there is one, into the cell's run folder unless that has begun."""
    source = folder_of(replace(cell, judged="val" if cell.judged == "test" else "test"), runs)
    target = folder_of(cell, runs)
    if not target.exists() and (source / "result.json").is_file():
        hand_over(source, target)
