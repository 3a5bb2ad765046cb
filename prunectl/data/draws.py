"""Random numbers by position: the i-th number of a stream is a pure function of (key, i), with no state to keep.

One source of chance for split, order and augmentation, so that all three are the same for any number of workers, ranks
and threads, and on every version of NumPy and torch. The generator is SplitMix64 with random access (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of its reference implementation)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1

Index = NDArray[np.int64]


class Stream(IntEnum):
    """What a stream of numbers decides; the first part of its key. A number here is part of every published split."""

    ORDER = 1
    SHIFT_Y = 2
    SHIFT_X = 3
    FLIP = 4
    CROP = 5
    SAMPLE = 6
    LIMIT = 7
    VALIDATION = 8
    SUBSET = 9
    EMBEDDED = 10


def bits(key: tuple[int, ...], index: Index) -> NDArray[np.uint64]:
    """64 random bits for each position in `index` of the stream `key`."""
    state = 0
    for part in key:
        state = _mixed(state + GAMMA * ((part & MASK) + 1))
    z = np.uint64(state) + np.uint64(GAMMA) * (index.astype(np.uint64) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(key: tuple[int, ...], index: Index) -> NDArray[np.float64]:
    """A number in [0, 1) for each position."""
    return (bits(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(key: tuple[int, ...], index: Index, high: int) -> Index:
    """A whole number in [0, high) for each position."""
    return (uniforms(key, index) * high).astype(np.int64)


def permutation(key: tuple[int, ...], n: int) -> Index:
    """The positions 0 .. n-1 in random order."""
    return np.argsort(bits(key, np.arange(n)), kind="stable")


def _mixed(z: int) -> int:
    z &= MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
