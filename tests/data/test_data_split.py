"""Stratified parts: exact sizes, disjoint, the same for the same labels."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.data import load
from prunectl.data.split import subset, validation
from prunectl.errors import UsageError

label_lists = st.lists(st.integers(0, 6), min_size=2, max_size=200).map(lambda xs: np.array([*xs, 0, 0], dtype=np.int64))


@given(label_lists, st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_validation_takes_its_share_of_every_class(labels, fraction):
    train, val = validation(labels, fraction)
    assert sorted([*train, *val]) == list(range(len(labels)))
    for c, size in enumerate(np.bincount(labels)):
        taken = (labels[val] == c).sum()
        if size < 2:
            assert taken == 0
        else:
            assert 1 <= taken <= size - 1 and abs(taken - fraction * size) <= 1


@given(label_lists, st.data())
@settings(max_examples=100, deadline=None)
def test_subset_is_exact_and_stratified(labels, data):
    n = data.draw(st.integers(1, len(labels)))
    chosen = subset(labels, n)
    assert len(set(chosen)) == n
    shares = np.bincount(labels) * n / len(labels)
    assert (np.abs(np.bincount(labels[chosen], minlength=len(shares)) - shares) < 1).all()


def test_validation_is_drawn_and_not_cut_off():
    labels = np.repeat(np.arange(4), 100)
    _, val = validation(labels, 0.2)
    inside = val % 100  # positions within the class: a random fifth has mean 49.5
    assert abs(inside.mean() - 49.5) < 4 * 29 / np.sqrt(80)  # four standard errors
    assert len(set(inside[:20]) ^ set(inside[20:40])) > 0  # and another one in every class


def test_the_split_of_a_published_set_never_moves():
    """Accuracies are comparable over versions only if this holds; a change of the split must be deliberate."""
    ds = load("fashion-mini")
    digest = hashlib.sha256(ds.splits["val"].astype("<i8").tobytes()).hexdigest()
    assert digest == "a4d890c08840824304f800e920088e9b8825f6945a1f75229f0aa0d93b601309"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(UsageError, match="val_fraction"):
        validation(np.zeros(10, np.int64), fraction)


def test_nothing_to_set_aside_is_refused():
    with pytest.raises(UsageError, match="no class has two"):
        validation(np.arange(5), 0.5)


@pytest.mark.parametrize("n", [0, -3, 11])
def test_an_impossible_subset_is_refused(n):
    with pytest.raises(UsageError, match="train_images"):
        subset(np.zeros(10, np.int64), n)
