"""Which entries an N:M pattern keeps: the n largest magnitudes of every m consecutive input channels, ties to the lowest channel.

Two channels that are d apart lie d strides apart in memory, so comparing a tensor with itself, shifted, compares every pair of
every group at once, whatever the memory format: m - 1 shifts of whole arrays instead of a gather, a sort or an index."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from prunectl.errors import UsageError
from prunectl.pruning.topk import MAGNITUDE, bits_of, is_dense, memory_order

MOST_CHANNELS = 127  # of a group: what a byte counts to
_PART = 1 << 17  # entries whose magnitudes, places and counts share a core's cache


def nm_qualifies(shape: torch.Size, m: int) -> bool:
    """Whether a weight (out, in, ...) splits into groups of m consecutive input channels; depthwise and 1-D ones do not."""
    return len(shape) >= 2 and shape[1] % m == 0


def check_groups(x: Tensor, m: int) -> None:
    """Raises UsageError if x has no groups of m channels, or m is more than the counts here are made for."""
    if not nm_qualifies(x.shape, m):
        raise UsageError(f"constraint nm: a tensor of shape {tuple(x.shape)} has no input channels in groups of {m}; use an L2 ball.")
    if m > MOST_CHANNELS:
        raise UsageError(f"constraint nm: m = {m}, expected at most {MOST_CHANNELS}.")


def channel_groups(x: Tensor, m: int) -> Tensor:
    """x (out, in, ...) as (out, in / m, m, ...). Raises UsageError if it does not split."""
    check_groups(x, m)
    return x.reshape(x.shape[0], -1, m, *x.shape[2:])


def nm_mask(x: Tensor, n: int, m: int) -> Tensor:
    """True on the n largest magnitudes of every m consecutive input channels of x (out, in, ...); laid out like x if x is dense.

    Temporary memory beside the result on the CPU: m + 6 bytes an entry of a part. Raises UsageError if x does not qualify."""
    check_groups(x, m)
    if x.device.type != "cpu":
        return _mask_without_sync(x, n, m)
    x = x if is_dense(x) else x.contiguous()
    kept = torch.ones_like(x, dtype=torch.bool)
    if n < m:
        mark_kept_(memory_order(kept).numpy(), bits_of(x), n, m, x.stride(1))
    return kept


def mark_kept_(kept: np.ndarray, bits: np.ndarray, n: int, m: int, stride: int) -> None:
    """kept = True where fewer than n of the group's other magnitudes beat this one; 1-D in memory order, whole groups.

    bits: the floats' bits as integers (`bits_of`); stride: entries from one input channel to the next."""
    size = max(1, _PART // (m * stride)) * m * stride
    magnitude = np.empty(min(size, bits.size), bits.dtype)
    beaten, wins = np.empty(magnitude.size, np.int8), np.empty(magnitude.size, bool)
    for start in range(0, bits.size, size):
        part = bits[start : start + size]
        a, count = magnitude[: part.size], beaten[: part.size]
        np.bitwise_and(part, MAGNITUDE[part.dtype.itemsize], out=a)
        count.fill(0)
        for d, followed in enumerate(_followed(m, stride, size), 1):
            win, pairs = wins[: part.size - d * stride], followed[: part.size - d * stride]
            np.greater_equal(a[: win.size], a[d * stride :], out=win)
            win &= pairs
            count[d * stride :] += win.view(np.int8)
            win ^= pairs
            count[: win.size] += win.view(np.int8)
        np.less(count, n, out=kept[start : start + size])


@functools.lru_cache(maxsize=16)
def _followed(m: int, stride: int, size: int) -> list[np.ndarray]:
    """For d = 1 .. m-1, where in `size` entries the channel d further on belongs to the same group."""
    place = np.tile(np.repeat(np.arange(m), stride), size // (m * stride))
    return [place + d < m for d in range(1, m)]


def _mask_without_sync(x: Tensor, n: int, m: int) -> Tensor:
    """nm_mask by m(m-1)/2 comparisons of slices, for other devices; also runs under `torch.func.vmap`."""
    members = channel_groups(x.abs(), m).movedim(2, 0).contiguous()
    beaten_by = torch.zeros_like(members, dtype=torch.int8)
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = members[i] >= members[j]
            beaten_by[j] += first_wins
            beaten_by[i] += ~first_wins
    kept = (beaten_by < n).movedim(0, 2).reshape(x.shape)
    return kept if x.is_contiguous() else torch.empty_like(x, dtype=torch.bool).copy_(kept)
