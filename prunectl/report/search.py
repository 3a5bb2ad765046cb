"""The search as a picture: what each detector saw at each probe, and how far the partition moved between any two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunectl.files import atomic


def plot_search(
    path: Path,
    detectors: Mapping[str, Any],
    epochs: Sequence[float],
    matrix: Sequence[Sequence[float]],
    *,
    drawn: float | None,
    eps: float | None,
    title: str,
) -> None:
    """A PNG at `path`. detectors: name -> {"distances": [{"epoch", "max"}]}; matrix: distance of the codes at `epochs`.

    drawn: after how many epochs; eps: the distance below which the deciding detector fires."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, square = figure.subplots(1, 2)
    for name, found in detectors.items():
        points = [(d["epoch"], d["max"]) for d in found["distances"] if d["max"] is not None]
        if points:
            curves.plot(*zip(*points, strict=True), marker=".", label=name)
    if drawn is not None:
        curves.axvline(drawn, color="grey", linestyle="--", label="drawn")
    if eps is not None:
        curves.axhline(eps, color="grey", linestyle=":", label="eps")
    curves.set(xlabel="epochs", ylabel="largest of the last distances", ylim=(0, None))
    curves.set_title(title, parse_math=False)  # a path may hold dollar signs
    curves.grid(alpha=0.3)
    if curves.get_legend_handles_labels()[0]:
        curves.legend()
    if len(epochs) > 1:
        shown = square.imshow(matrix, origin="lower", cmap="viridis", vmin=0)
        few = range(0, len(epochs), max(1, len(epochs) // 8))
        square.set_xticks(few, [f"{epochs[i]:g}" for i in few])
        square.set_yticks(few, [f"{epochs[i]:g}" for i in few])
        figure.colorbar(shown, ax=square, label="share of ReLU bits that differ")
        square.set(xlabel="epochs", ylabel="epochs", title="distance between the partitions of any two probes")
    else:
        square.set_axis_off()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
