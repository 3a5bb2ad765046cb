"""The accuracy of a one-shot sweep as a picture. Drawn without a display and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunectl.files import atomic


def plot_sweep(path: Path, rows: Sequence[dict[str, Any]], *, dense: float, title: str, split: str) -> None:
    """A PNG at `path`: accuracy in percent at each sparsity, before and after batch norm is re-estimated, and the dense one.

    rows: `sparsity`, `accuracy_raw`, `accuracy_bn_recalibrated` (or None). Ratios stand at equal distances: what happens
    between 90 and 99 % is of interest as much as what happens below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    for key, label in (("accuracy_raw", "as pruned"), ("accuracy_bn_recalibrated", "batch norm re-calibrated")):
        if all(row[key] is not None for row in rows):
            axes.plot(places, [row[key] for row in rows], marker="o", label=label)
    axes.axhline(dense, color="grey", linestyle="--", label="dense")
    axes.set_xticks(places, [f"{100 * row['sparsity']:g}" for row in rows])
    axes.set(xlabel="weights removed, %, with no retraining", ylabel=f"{split} accuracy, %")
    axes.set_title(title, parse_math=False)  # a path may hold dollar signs
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")  # Agg: a figure of its own has no window
