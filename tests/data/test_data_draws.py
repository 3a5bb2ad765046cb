"""Chance by position: equals the published generator, is even, and streams do not depend on each other."""

from __future__ import annotations

import numpy as np
import pytest

from prunectl.data.draws import GAMMA, MASK, Stream, bits, integers, permutation, uniforms

N = 200_000


def splitmix64(seed: int, n: int) -> list[int]:
    """Slow reference: Steele, Lea and Flood 2014; https://prng.di.unimi.it/splitmix64.c."""
    out = []
    for _ in range(n):
        seed = (seed + GAMMA) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_equals_the_reference_generator():
    assert bits((), np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F] == splitmix64(0, 3)
    (state,) = splitmix64(GAMMA * 5, 1)  # a key (5,) moves the state to a place of its own
    assert bits((5,), np.arange(50)).tolist() == splitmix64(state, 50)


def test_a_number_depends_on_its_position_alone():
    index = np.array([7, 0, 123_456_789_012, 7])
    alone = [bits((3, 1), np.array([i]))[0] for i in index]
    assert bits((3, 1), index).tolist() == alone


@pytest.mark.parametrize("key", [(Stream.SHIFT_X, 0, 0), (Stream.SHIFT_Y, 0, 1), (Stream.FLIP, 12345, 89)])
def test_numbers_are_even(key):
    counts = np.bincount(integers(key, np.arange(N), 9), minlength=9)
    chi2 = ((counts - N / 9) ** 2 / (N / 9)).sum()
    assert chi2 < 26.1  # 99.9 % quantile of chi-square with 8 degrees of freedom; fixed keys, so it cannot flicker
    u = uniforms(key, np.arange(N))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 / np.sqrt(12 * N)  # four standard errors


def test_streams_seeds_epochs_and_neighbours_are_independent():
    keys = [(Stream.FLIP, 0, 0), (Stream.FLIP, 0, 1), (Stream.FLIP, 1, 0), (Stream.SHIFT_X, 0, 0), (Stream.SHIFT_X, 0, 1)]
    rows = np.stack([uniforms(key, np.arange(N)) for key in keys] + [uniforms(keys[0], np.arange(1, N + 1))])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(N)  # 4.5 standard errors over 15 pairs


def test_permutation_is_one_and_moves_with_its_key():
    a, b = permutation((1, 0, 0), 1000), permutation((1, 0, 1), 1000)
    assert sorted(a) == sorted(b) == list(range(1000))
    assert (a == b).sum() < 10  # two random orders of 1000 share one position on average


def test_negative_and_huge_seeds_are_seeds():
    streams = {tuple(bits((1, seed), np.arange(4)).tolist()) for seed in (-1, 0, 1, 2**63, 2**64 - 2)}
    assert len(streams) == 5
