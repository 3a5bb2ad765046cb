"""Stratified parts of a labelled set, the same in every run: they depend on the labels alone, never on the run's seed."""

from __future__ import annotations

import numpy as np

from prunectl.data.draws import Index, Stream, bits
from prunectl.errors import UsageError


def validation(labels: Index, fraction: float) -> tuple[Index, Index]:
    """(training, validation) positions: `fraction` of every class, at least one image of a class that has two.

    Both sorted. Raises UsageError if the fraction is not in (0, 1) or leaves one side empty."""
    if not 0 < fraction < 1:
        raise UsageError(f"data.val_fraction = {fraction}: must lie in (0, 1), e.g. 0.1.")
    sizes = np.bincount(labels)
    counts = np.where(sizes > 1, np.clip(np.rint(sizes * fraction), 1, np.maximum(sizes - 1, 1)), 0).astype(np.int64)
    if counts.sum() == 0:
        raise UsageError(f"no class has two training images ({len(labels)} in all): none can be set aside for validation.")
    chosen = pick(labels, counts, Stream.VALIDATION)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def subset(labels: Index, n: int) -> Index:
    """`n` positions, sorted, with every class's share kept to within one image.

    Raises UsageError unless 1 <= n <= len(labels)."""
    if not 1 <= n <= len(labels):
        raise UsageError(f"data.train_images = {n}: the training part has {len(labels)} images; ask for 1 to {len(labels)}.")
    shares = np.bincount(labels) * (n / len(labels))
    counts = np.floor(shares).astype(np.int64)
    # largest remainder; a stable sort breaks ties by class number
    most = np.argsort(counts - shares, kind="stable")[: n - counts.sum()]
    counts[most] += 1
    return pick(labels, counts, Stream.SUBSET)


def pick(labels: Index, counts: Index, stream: Stream) -> Index:
    """The positions, sorted, of `counts[c]` images of each class c, drawn by position."""
    order = np.lexsort((bits((stream,), np.arange(len(labels))), labels))  # by class, then by chance
    sizes = np.bincount(labels, minlength=len(counts))
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # 0, 1, ... within each class
    return np.sort(order[place < np.repeat(counts, sizes)])
