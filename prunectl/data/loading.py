"""From a name or a folder to a `Dataset`: find it, read it, carve validation from training, decide how it is fitted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.data import datasets
from prunectl.data.dataset import Dataset, DatasetInfo, View
from prunectl.data.draws import Index
from prunectl.data.folders import image_folder
from prunectl.data.memory import MemoryPool, blank, in_process
from prunectl.data.photos import measured
from prunectl.data.source import Place, Raw, Source
from prunectl.data.split import subset, validation
from prunectl.data.workers import WorkerStream, default_workers
from prunectl.errors import DataMissing, NotDownloaded, UnknownName, UsageError
from prunectl.registry import canonical

POLICIES = ("none", "flip", "crop", "crop-flip", "imagenet")
FITS = ("pad", "resize")


@dataclass(frozen=True)
class DatasetSummary:
    """What decides about a network before any image is read.

    image_size: H = W of the images. photos: they come in every size, so that `load` takes any image_size for them."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    photos: bool


def describe(name_or_folder: str, *, data_dir: str | Path | None = None) -> DatasetSummary:
    """The summary of a data set; reads no images of a registered set, a few headers of a folder's.

    Raises UnknownName, or DataMissing if a folder has no classes."""
    source = _source(name_or_folder, data_dir)
    return DatasetSummary(source.name, source.classes, source.channels, source.image_size, source.photos)


def load(
    name_or_folder: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    fit: str = "pad",
    val_fraction: float | None = None,
    train_images: int | None = None,
    augment: str | None = None,
    workers: int | None = None,
    download: bool = True,
    normalisation: Mapping[str, tuple[float, ...]] | None = None,
) -> Dataset:
    """The data set, its training part split into training and validation images, always in the same way.

    data_dir: where it lies, else $PRUNECTL_DATA, else ~/.cache/prunectl. image_size: what the network wants, else the
    images' own; `fit` brings them to it by `pad` (black border) or `resize`; photos are resized and cropped either way.
    val_fraction: of every class of the training images, by default 0.1 (imagenet 0.02); folders may have their own val. train_images: train
    on a stratified part of this size. augment: none, flip, crop, crop-flip or imagenet, by default what is usual for the set.
    workers: processes that read image files (0: none). download: fetch what can be fetched and is not there; without it, such a
    set is blank images of the published number, for plans. normalisation: mean and std, each per channel, that a network was
    trained with, in the place of the set's own. Raises UnknownName, UsageError or DataMissing."""
    source = _source(name_or_folder, data_dir, download)
    policy = _choice("augmentation", augment if augment is not None else source.augment, POLICIES)
    fit = _choice("fit", fit, FITS)
    size = image_size if image_size is not None else source.image_size
    if size < 1:
        raise UsageError(f"data.image_size = {size}: must be a positive number of pixels.")
    if policy == "imagenet" and not source.photos:
        raise UsageError(f"data.augment = imagenet: {source.name} has no photos larger than its {source.image_size} pixels; use crop-flip.")
    if fit == "pad" and size < source.image_size and not source.photos:
        raise UsageError(
            f"data.image_size = {size}: {source.name}'s images of {source.image_size} pixels cannot be padded to it;"
            " fit='resize' shrinks them."
        )

    missing = None
    try:
        raw = source.read(size)
    except NotDownloaded as problem:
        raw, missing = _blank(source, problem), str(problem)
    _check(source, raw)
    if raw.val is not None and val_fraction is not None:
        raise UsageError(f"data.val_fraction = {val_fraction:g}: {source.name} has validation images of its own; leave it out.")
    splits = _splits(raw, source.val_fraction if val_fraction is None else val_fraction, train_images)
    stats = normalisation or _stats(source, raw, splits)
    if source.photos:
        fit = "resize-crop"
    elif size == source.image_size:
        fit = "none"
    view = View(raw.pool, size, fit, **stats)
    info = DatasetInfo(
        name=source.name,
        classes=source.classes,
        channels=source.channels,
        image_size=size,
        fit=fit,
        n_train=len(splits["train"]),
        n_val=len(splits["val"]),
        n_test=len(splits["test"]),
        augment=policy,
        native=size if source.photos else source.image_size,
        **stats,
    )
    processes = default_workers() if workers is None else workers
    if processes < 0:
        raise UsageError(f"workers = {processes}: must be 0 or more.")
    in_memory = isinstance(raw.pool, MemoryPool) or processes == 0
    return Dataset(info, splits, partial(in_process, view) if in_memory else WorkerStream(view, processes), raw.pool.fingerprint, missing)


def _source(name_or_folder: str, data_dir: str | Path | None, download: bool = True) -> Source:
    base = Path(data_dir or os.environ.get("PRUNECTL_DATA") or "~/.cache/prunectl").expanduser()
    if name_or_folder in datasets:
        name = canonical(name_or_folder)
        source: Source = datasets.get(name)(Place(name, base, download))
        return source
    folder = Path(name_or_folder).expanduser()
    for candidate in (folder, base / folder):
        if candidate.is_dir():
            return image_folder(candidate)
    if folder.exists():
        raise DataMissing(f"{folder} is a file: a data set is a registered name or a folder with train/ and val/.")
    if os.sep in name_or_folder or name_or_folder.startswith((".", "~")):
        raise DataMissing(f"{name_or_folder} does not exist: a data set is a registered name or a folder with train/ and val/.")
    raise UnknownName("data set", name_or_folder, datasets.names(), hint="Or give a folder with train/ and val/.")


def _stats(source: Source, raw: Raw, splits: Mapping[str, Index]) -> Mapping[str, tuple[float, ...]]:
    return {"mean": source.mean, "std": source.std} if source.mean and source.std else measured(raw.pool, splits["train"])


def _blank(source: Source, problem: NotDownloaded) -> Raw:
    if source.sizes is None:
        raise problem
    n_train, n_test = source.sizes
    pool = blank(n_train + n_test, len(source.classes), source.channels, source.image_size)
    return Raw(pool, *np.split(np.arange(n_train + n_test), [n_train]))


def _splits(raw: Raw, val_fraction: float, train_images: int | None) -> dict[str, Index]:
    labels, train, val = raw.pool.labels, raw.train, raw.val
    if val is None:
        rest, chosen = validation(labels[train], val_fraction)
        train, val = train[rest], train[chosen]
    if train_images is not None:
        train = train[subset(labels[train], train_images)]
    return {"train": train, "val": val, "test": raw.test}


def _check(source: Source, raw: Raw) -> None:
    """Raises DataMissing if a part is empty or a label is no class."""
    for part, index in (("training", raw.train), ("test", raw.test)):
        if len(index) == 0:
            raise DataMissing(f"{source.name}: its files hold no {part} images.")
    found = np.unique(raw.pool.labels)
    if found[0] < 0 or found[-1] >= len(source.classes):
        raise DataMissing(
            f"{source.name}: its files have labels {found[0]} to {found[-1]} where 0 to {len(source.classes) - 1} are expected: "
            "they belong to another data set."
        )


def _choice(kind: str, name: str, known: tuple[str, ...]) -> str:
    if name.replace("_", "-") not in known:
        raise UnknownName(kind, name, known)
    return name.replace("_", "-")
