"""Labelled images: every data set through one `load`, split, augmented and normalised the same way everywhere.

`datasets` is the registry of names; a folder in ImageFolder layout needs none. Training order and augmentation are a
pure function of (seed, epoch), the split into training and validation images of nothing but the data. Importing this
package alone imports no torch, so that `prunectl list` stays fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunectl.registry import Registry

if TYPE_CHECKING:
    from prunectl.data.dataset import Batch, Dataset, DatasetInfo
    from prunectl.data.images import preprocess
    from prunectl.data.loading import DatasetSummary, describe, load

datasets = Registry("dataset", "data/catalog.py")

_HOMES = {
    "Batch": "dataset",
    "Dataset": "dataset",
    "DatasetInfo": "dataset",
    "DatasetSummary": "loading",
    "describe": "loading",
    "load": "loading",
    "preprocess": "images",
}

__all__ = ["Batch", "Dataset", "DatasetInfo", "DatasetSummary", "datasets", "describe", "load", "preprocess"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
