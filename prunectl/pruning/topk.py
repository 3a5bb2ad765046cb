"""The k largest magnitudes of a tensor, exactly: never k-1 or k+1 of them, ties to the lowest row-major index.

Magnitudes are compared as the integers their bits spell: IEEE 754 orders non-negative floats as it orders integers, so one
code serves every float width. On the CPU the k-th largest is bracketed, by where it last lay or by a strided sample; one
cached pass counts what lies above the bracket and collects what lies in it, and a partition of those few finds the value. A
missed bracket costs time, never exactness. Elsewhere nothing waits for the device: no `.item()`, no data-dependent shape.
Input is finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MAGNITUDE = {t().itemsize: np.array(np.iinfo(t).max, t) for t in (np.int64, np.int32, np.int16)}  # every bit but the sign
_CHUNK = 1 << 18  # entries; numpy's cost per call vanishes, the arrays still sit in L2 or L3
_PARTITION_BELOW = 1 << 13  # entries; under this a plain partition is the faster way
_SAMPLE_SIGMA = 4.0


class Workspace:
    """What may be reused from one call on a tensor to the next: memory for the result, and where its k-th largest lay.

    It makes calls faster and changes no result. The buffer may be shared: a result is valid until the next call that has it."""

    def __init__(self, buffer: Tensor | None = None) -> None:
        self.buffer = buffer
        self.bracket: tuple[int, int] | None = None
        self._last: int | None = None

    def like(self, x: Tensor) -> Tensor:
        """Memory laid out like x: the buffer's if it is large enough, else new."""
        if self.buffer is None or self.buffer.numel() < x.numel() or self.buffer.dtype != x.dtype or self.buffer.device != x.device:
            return torch.empty_like(x)
        return self.buffer.as_strided(x.shape, x.stride()) if is_dense(x) else torch.empty_like(x)

    def saw(self, kth: int, dtype: torch.dtype) -> None:
        """The next bracket: four times the last move to either side, at least 0.4 %, the first time 3 %."""
        octave = round(1 / torch.finfo(dtype).eps)  # integers from one power of two to the next
        reach = octave >> 5 if self._last is None else max(4 * abs(kth - self._last), octave >> 8)
        self.bracket = max(kth - reach - 1, 0), kth + reach + 1
        self._last = kth


def top_k(x: Tensor, k: int, *, workspace: Workspace | None = None) -> Tensor:
    """x on its k largest magnitudes and 0 elsewhere; same shape, dtype, device and memory format.

    1 <= k; k >= x.numel() keeps everything. Temporary memory beside the result: a cache's worth on the CPU, up to 1.75 times x
    elsewhere."""
    workspace = workspace or Workspace()
    if x.device.type != "cpu":
        return x.clone() if k >= x.numel() else _top_k_without_sync(x, k)
    kept = workspace.like(x)
    if k >= x.numel():
        return kept.copy_(x)
    kth, surplus = _kth_largest(_bits(x), k, workspace.bracket)
    workspace.saw(kth, x.dtype)
    below = _float_of(max(kth - 1, 0), x.dtype).item()
    torch.ops.aten.hardshrink.out(x, below, out=kept)  # |x| > below is |x| >= kth: no float lies between
    if surplus and kth:
        kept[_last_ties(x, kth, surplus)] = 0
    return kept


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """True on the k largest magnitudes of x, exactly min(k, n) of them even where they are zeros; bool, shape of x, 0 <= k."""
    if k == 0 or k >= x.numel():
        return torch.full_like(x, k > 0, dtype=torch.bool)
    if x.device.type != "cpu":
        return _mask_without_sync(x, k)
    kth, surplus = _kth_largest(_bits(x), k)
    mask = x.abs() >= _float_of(kth, x.dtype)
    if surplus:
        mask[_last_ties(x, kth, surplus)] = False
    return mask


def is_dense(x: Tensor) -> bool:
    """Whether x fills one block of memory without gaps or overlaps, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def memory_order(x: Tensor) -> Tensor:
    """The entries of x as they lie in memory: a 1-D view if x is dense, else a row-major copy."""
    if x.is_contiguous():
        return x.view(-1)
    return x.as_strided((x.numel(),), (1,)) if is_dense(x) else x.flatten()


def _bits(x: Tensor) -> np.ndarray:
    integers: np.ndarray = memory_order(x.detach()).view(_INTEGER[x.dtype]).numpy()
    return integers


def _float_of(bits: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(bits, dtype=_INTEGER[dtype]).view(dtype)


def _last_ties(x: Tensor, kth: int, count: int) -> tuple[Tensor, ...]:
    """Index of the last `count` entries, in row-major order, whose magnitude is the k-th."""
    return tuple((x.abs() == _float_of(kth, x.dtype)).nonzero()[-count:].T)


def _kth_largest(bits: np.ndarray, k: int, guess: tuple[int, int] | None = None) -> tuple[int, int]:
    """(bits of the k-th largest magnitude, number of entries at or above it beyond k). bits: 1-D integers, 1 <= k <= n."""
    magnitude = _MAGNITUDE[bits.dtype.itemsize]
    if bits.size > _PARTITION_BELOW:
        for low, high in _brackets(bits, k, magnitude, guess):
            above, inside = _scan(bits, low, high, magnitude)
            if above < k <= above + inside.size:
                return _select(inside, k - above)
    return _select(bits & magnitude, k)


def _brackets(bits: np.ndarray, k: int, magnitude: np.ndarray, guess: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    if guess is not None:
        yield guess[0], min(guess[1], int(magnitude))
    yield _sampled_bracket(bits, k, magnitude)


def _sampled_bracket(bits: np.ndarray, k: int, magnitude: np.ndarray) -> tuple[int, int]:
    """Two magnitudes between which the k-th largest of `bits` lies, but for about one case in ten thousand."""
    stride = max(bits.size // 16384, min(32, bits.size // 1024))
    while math.gcd(stride, 210) != 1:  # no stride in step with kernel sizes or channel counts
        stride += 1
    sample = bits[::stride] & magnitude
    share = k / bits.size
    rank = sample.size * (1 - share)
    spread = _SAMPLE_SIGMA * math.sqrt(sample.size * share * (1 - share)) + 2
    ends = max(int(rank - spread), 0), min(int(rank + spread), sample.size - 1)
    sample.partition(ends)
    low = 0 if ends[0] == 0 else int(sample[ends[0]])
    high = int(magnitude) if ends[1] == sample.size - 1 else int(sample[ends[1]])
    return low, high


def _scan(bits: np.ndarray, low: int, high: int, magnitude: np.ndarray) -> tuple[int, np.ndarray]:
    """(number of magnitudes above `high`, the magnitudes in [low, high])."""
    above, inside = 0, []
    buffer, beyond, within = np.empty(_CHUNK, bits.dtype), np.empty(_CHUNK, bool), np.empty(_CHUNK, bool)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        n = chunk.size
        np.bitwise_and(chunk, magnitude, out=buffer[:n])
        np.greater(buffer[:n], high, out=beyond[:n])
        np.greater_equal(buffer[:n], low, out=within[:n])
        within[:n] ^= beyond[:n]
        above += int(np.count_nonzero(beyond[:n]))
        inside.append(buffer[:n][within[:n]])
    return above, np.concatenate(inside)


def _select(magnitudes: np.ndarray, k: int) -> tuple[int, int]:
    """(k-th largest, number of entries equal to it that did not fit). Reorders `magnitudes`."""
    cut = magnitudes.size - k
    magnitudes.partition(cut)
    return int(magnitudes[cut]), int(np.count_nonzero(magnitudes[:cut] == magnitudes[cut]))


def _top_k_without_sync(x: Tensor, k: int) -> Tensor:
    return torch.where(_mask_without_sync(x, k), x, 0)


def _mask_without_sync(x: Tensor, k: int) -> Tensor:
    """top_k_mask for devices on which reading a number back stalls the queue; also runs under `torch.func.vmap`."""
    magnitude = x.abs().flatten()
    kth = torch.topk(magnitude, k, sorted=False).values.amin()
    above, tied = magnitude > kth, magnitude == kth
    del magnitude
    room = k - above.sum()
    mask = (above | (tied & (tied.cumsum(0, dtype=torch.int32) <= room))).view(x.shape)
    return mask if x.is_contiguous() else torch.empty_like(x, dtype=torch.bool).copy_(mask)
