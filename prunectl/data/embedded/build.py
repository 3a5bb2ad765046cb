"""Makes fashion-mini.npz from Fashion-MNIST: 1,000 training and 200 test images of every class, unchanged, in their
original order, with their original positions. The choice depends on positions alone, so every build is the same.

    python -m prunectl.data.embedded.build [FOLDER]      # default: what Debian's package dataset-fashion-mnist installs"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.data.draws import Stream
from prunectl.data.formats import read_mnist_pair
from prunectl.data.readers import DEBIAN_FASHION_MNIST, EMBEDDED
from prunectl.data.split import pick

PER_CLASS = {"train": ("train", 1000), "test": ("t10k", 200)}


def build(folder: Path) -> dict[str, NDArray[Any]]:
    """The archive's arrays: for train and test, `_images` uint8 (N, 28, 28), `_labels` uint8 (N,), `_positions` uint16 (N,)."""
    arrays: dict[str, NDArray[Any]] = {}
    for split, (prefix, n) in PER_CLASS.items():
        images, labels = read_mnist_pair(folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = pick(labels, np.full(10, n), Stream.EMBEDDED)
        arrays[f"{split}_images"] = images[chosen, 0]
        arrays[f"{split}_labels"] = labels[chosen].astype(np.uint8)
        arrays[f"{split}_positions"] = chosen.astype(np.uint16)
    return arrays


if __name__ == "__main__":
    np.savez_compressed(EMBEDDED, allow_pickle=False, **build(Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN_FASHION_MNIST))
    print(f"{EMBEDDED}: {EMBEDDED.stat().st_size:,} bytes")
