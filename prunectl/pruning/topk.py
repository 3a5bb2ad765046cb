"""The k largest magnitudes of a tensor, exactly: never k-1 or k+1 of them, ties to the lowest row-major index.

Magnitudes are compared as the integers their bits spell: IEEE 754 orders non-negative floats as it orders integers, so one
code serves every float width. On the CPU a strided sample brackets the k-th largest, one cached pass counts what lies above the
bracket and collects what lies in it, and a partition of those few finds the value. A missed bracket costs time, never
exactness. Elsewhere nothing waits for the device: no `.item()`, no data-dependent shape.
Input is finite."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_CODES = {torch.float64: ("q", "d"), torch.float32: ("i", "f"), torch.float16: ("h", "e")}  # of the struct module
_OCTAVE = {dtype: round(1 / torch.finfo(dtype).eps) for dtype in _INTEGER}  # integers from one power of two to the next
MAGNITUDE = {t().itemsize: np.array(np.iinfo(t).max, t) for t in (np.int64, np.int32, np.int16)}  # every bit but the sign
CHUNK = 1 << 19  # entries; few enough to stay in cache, enough to drown the cost of a call
_SCANNED = 1 << 16  # entries; a few such arrays sit in a core's L2 cache
PARTITION_UPTO = 1 << 13  # entries; up to this a plain partition is the faster way
_SAMPLE_SIGMA = 4.0


class Bracket:
    """Where the k-th largest of a slowly changing tensor is expected, from where it last was. A guess: it changes no result."""

    def __init__(self) -> None:
        self.guess: tuple[int, int] | None = None
        self._last: int | None = None

    def saw(self, kth: int, dtype: torch.dtype) -> None:
        """The next guess is four times the last move to either side, at least 0.4 %, the first time 3 %."""
        octave = _OCTAVE[dtype]
        reach = octave >> 5 if self._last is None else max(4 * abs(kth - self._last), octave >> 8)
        self.guess = kth - reach - 1, kth + reach + 1
        self._last = kth


def top_k(x: Tensor, k: int, *, memory: Tensor | None = None) -> Tensor:
    """x on its k largest magnitudes and 0 elsewhere; same shape, dtype, device and memory format.

    1 <= k; k >= x.numel() keeps everything. The result is laid over `memory` as far as `like` allows. Temporary memory beside
    the result: a cache's worth on the CPU, up to 1.75 times x elsewhere."""
    if x.device.type != "cpu":
        return x.clone() if k >= x.numel() else _top_k_without_sync(x, k)
    kept = like(x, memory)
    if k >= x.numel():
        return kept.copy_(x)
    kth, surplus = kth_largest(bits_of(x), k)
    keep_at_least_(kept, x, kth)
    if surplus and kth:
        kept[last_ties(x, kth, surplus)] = 0
    return kept


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """True on the k largest magnitudes of x, exactly min(k, n) of them even where they are zeros; bool, shape of x, 0 <= k."""
    if k == 0 or k >= x.numel():
        return torch.full_like(x, k > 0, dtype=torch.bool)
    if x.device.type != "cpu":
        return _mask_without_sync(x, k)
    kth, surplus = kth_largest(bits_of(x), k)
    mask = x.abs() >= value_of(kth, x.dtype)
    if surplus:
        mask[last_ties(x, kth, surplus)] = False
    return mask


def keep_at_least_(out: Tensor, x: Tensor, kth: int) -> None:
    """out = x where its magnitude is at least that of the bits `kth`, else 0 (one pass)."""
    below = value_of(max(kth - 1, 0), x.dtype)  # |x| > below is |x| >= kth: no float lies between
    torch.ops.aten.hardshrink.out(x, below, out=out)


def like(x: Tensor, memory: Tensor | None) -> Tensor:
    """An uninitialised tensor laid out like x: over the 1-D `memory` if that is large enough and of its kind, else new."""
    fits = memory is not None and memory.numel() >= x.numel() and (memory.dtype, memory.device) == (x.dtype, x.device) and is_dense(x)
    return memory.as_strided(x.shape, x.stride()) if memory is not None and fits else torch.empty_like(x)


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


def bits_of(x: Tensor) -> np.ndarray:
    """The bits of x as integers, 1-D in memory order, over the same memory if x is dense."""
    integers: np.ndarray = memory_order(x.detach()).view(_INTEGER[x.dtype]).numpy()
    return integers


def value_of(bits: int, dtype: torch.dtype) -> float:
    """The number that the bits of a magnitude spell."""
    if dtype == torch.bfloat16:
        bits, dtype = bits << 16, torch.float32  # a bfloat16 is the upper half of a float32
    integer, floating = _CODES[dtype]
    number: float = struct.unpack(floating, struct.pack(integer, bits))[0]
    return number


def last_ties(x: Tensor, kth: int, count: int) -> tuple[Tensor, ...]:
    """Index of the last `count` entries, in row-major order, whose magnitude is the k-th."""
    return tuple((x.abs() == value_of(kth, x.dtype)).nonzero()[-count:].T)


def kth_largest(bits: np.ndarray, k: int) -> tuple[int, int]:
    """(bits of the k-th largest magnitude, number of entries equal to it beyond the k).

    bits: 1-D, the floats' bits as integers; 1 <= k <= n."""
    if bits.size > PARTITION_UPTO:
        scan = Scan(*_sampled_bracket(bits, k), bits.dtype)
        scan.add(bits)
        if found := scan.kth_largest(k):
            return found
    return _select(bits & MAGNITUDE[bits.dtype.itemsize], k)


class Scan:
    """Counts the magnitudes above a bracket and collects those in it, part by part of a tensor's bits."""

    def __init__(self, low: int, high: int, dtype: np.dtype) -> None:
        self._magnitude = MAGNITUDE[dtype.itemsize]
        self._low, self._high = max(low, 0), min(high, int(self._magnitude))
        self._above, self._inside = 0, [np.empty(0, dtype)]
        self._buffer, self._beyond, self._within = np.empty(_SCANNED, dtype), np.empty(_SCANNED, bool), np.empty(_SCANNED, bool)

    def add(self, part: np.ndarray) -> None:
        for start in range(0, part.size, _SCANNED):
            self._add(part[start : start + _SCANNED])

    def _add(self, part: np.ndarray) -> None:
        n = part.size
        buffer, beyond, within = self._buffer[:n], self._beyond[:n], self._within[:n]
        np.bitwise_and(part, self._magnitude, out=buffer)
        np.greater(buffer, self._high, out=beyond)
        np.greater_equal(buffer, self._low, out=within)
        within ^= beyond
        self._above += int(np.count_nonzero(beyond))
        self._inside.append(buffer[np.flatnonzero(within)])  # half the time of a boolean index

    def kth_largest(self, k: int) -> tuple[int, int] | None:
        """As the function of that name, or None if the k-th largest of all parts is not in the bracket."""
        inside = np.concatenate(self._inside)
        return _select(inside, k - self._above) if self._above < k <= self._above + inside.size else None


def _sampled_bracket(bits: np.ndarray, k: int) -> tuple[int, int]:
    """Two magnitudes between which the k-th largest of `bits` lies, but for about one case in ten thousand."""
    stride = max(bits.size // 16384, min(32, bits.size // 1024))
    while math.gcd(stride, 210) != 1:  # no stride in step with kernel sizes or channel counts
        stride += 1
    magnitude = MAGNITUDE[bits.dtype.itemsize]
    sample = bits[::stride] & magnitude
    share = k / bits.size
    rank = sample.size * (1 - share)
    spread = _SAMPLE_SIGMA * math.sqrt(sample.size * share * (1 - share)) + 2
    ends = max(int(rank - spread), 0), min(int(rank + spread), sample.size - 1)
    sample.partition(ends)
    low = 0 if ends[0] == 0 else int(sample[ends[0]])
    high = int(magnitude) if ends[1] == sample.size - 1 else int(sample[ends[1]])
    return low, high


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
