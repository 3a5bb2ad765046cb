"""fashion-mini: what the package says it is, and rebuilt from its source to the same arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prunectl.data import load, readers
from prunectl.data.embedded.build import build
from prunectl.data.readers import DEBIAN_FASHION_MNIST, EMBEDDED
from prunectl.errors import DataMissing


def test_it_is_small_stratified_and_attributed():
    assert EMBEDDED.stat().st_size <= 7_000_000
    with np.load(EMBEDDED, allow_pickle=False) as arrays:
        assert arrays["train_images"].shape == (10_000, 28, 28) and arrays["test_images"].shape == (2_000, 28, 28)
        assert np.bincount(arrays["train_labels"]).tolist() == [1000] * 10
        assert np.bincount(arrays["test_labels"]).tolist() == [200] * 10
    notice = (EMBEDDED.parent / "NOTICE").read_text()
    assert "Zalando SE" in notice and "Permission is hereby granted" in notice


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_it_rebuilds_to_the_same_arrays():
    built = build(DEBIAN_FASHION_MNIST)
    with np.load(EMBEDDED, allow_pickle=False) as shipped:
        assert set(shipped.files) == set(built)
        for name, array in built.items():
            assert array.dtype == shipped[name].dtype and np.array_equal(array, shipped[name]), name


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_found_by_itself(tmp_path):
    info = load("fashion-mnist", data_dir=tmp_path).info
    assert (info.n_train, info.n_val, info.n_test) == (54_000, 6_000, 10_000)


def test_the_constants_are_its_statistics():
    x, _ = load("fashion-mini").sample(9_000, seed=0)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01  # the constants are those of all 60,000 images


def test_a_damaged_archive_is_named(tmp_path, monkeypatch):
    whole = EMBEDDED.read_bytes()
    broken = tmp_path / "fashion-mini.npz"
    monkeypatch.setattr(readers, "EMBEDDED", broken)
    flipped = bytearray(whole)
    flipped[1000] ^= 1
    for content in (None, b"", whole[:100_000], bytes(flipped)):
        broken.unlink(missing_ok=True)
        if content is not None:
            broken.write_bytes(content)
        with pytest.raises(DataMissing, match=r"fashion-mini\.npz"):
            load("fashion-mini")


def test_it_lies_inside_the_package():
    import prunectl

    assert EMBEDDED.is_relative_to(Path(prunectl.__file__).parent)
