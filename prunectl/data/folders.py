"""Data sets that come as folders of image files: any folder in ImageFolder layout, ImageNet, Tiny ImageNet.

The official validation images of a set whose test labels are secret serve as its test images; what choices are made on
is then carved from the training images, as for every other set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prunectl.data.images import common_size
from prunectl.data.listing import Listing, class_names, has_classes, images_below, list_split
from prunectl.data.photos import decoded, pooled
from prunectl.data.source import Raw, Source
from prunectl.errors import DataMissing

PHOTO_SIZE = 224
SMALL_SIZE = 64  # square images of one size up to this are taken as they are, not resized and cropped like photos
MEMORY_BYTES = 2 << 30  # what a set of small images may take in memory
LOOKED_AT = 32  # images whose size decides between the two


def image_folder(root: Path) -> Source:
    """A folder with train/CLASS/IMAGE and val/CLASS/IMAGE (or valid/).

    If it has test/CLASS/IMAGE too, val/ is validation; otherwise val/ is the test. Raises DataMissing if the layout is
    another."""
    if not (root / "train").is_dir():
        raise DataMissing(f"{root} has no folder train: expected {root}/train/CLASS/IMAGE.jpg and {root}/val/CLASS/IMAGE.jpg.")
    labelled = [split for split in ("test", "val", "valid") if has_classes(root / split)]
    if not labelled:
        raise DataMissing(f"{root} has no labelled images to test on: expected {root}/val/CLASS/IMAGE.jpg.")
    test, val = labelled[0], labelled[1] if labelled[0] == "test" and len(labelled) > 1 else None
    photos = photo_folder(root, root.resolve().name, test=test, val=val)
    size = _one_small_size(root, photos.classes)
    if size is None:
        return photos

    def read(_: int) -> Raw:
        return small_images(root, [list_split(root, split) for split in ("train", test, val) if split], photos.classes, size)

    return replace(photos, image_size=size, augment="crop-flip", photos=False, read=read)


def photo_folder(root: Path, name: str, *, test: str, val: str | None = None) -> Source:
    """Photos of any size in class folders: random windows in training, the centre in evaluation."""
    classes = tuple(class_names(root / "train"))
    if len(classes) == 1:
        raise DataMissing(f"{root / 'train'} has one class folder, '{classes[0]}': expected one for each of two or more classes.")

    def read(image_size: int) -> Raw:
        listings = [list_split(root, split) for split in ("train", test, val) if split]
        pool, parts = pooled(root, listings, classes, size=image_size)
        return Raw(pool, *parts)

    return Source(name, classes, 3, PHOTO_SIZE, read, augment="imagenet", photos=True)


def small_images(root: Path, listings: Sequence[Listing], classes: Sequence[str], size: int) -> Raw:
    """Square images of one size, decoded into memory once if they fit."""
    pool, parts = pooled(root, listings, classes, size=size, margin=1.0)
    fits = len(pool.labels) * 3 * size * size <= MEMORY_BYTES
    return Raw(decoded(pool) if fits else pool, *parts)


def annotated_split(root: Path, split: str, annotations: str) -> Listing:
    """The images of the flat folder `root/split/images`, with classes from a table of name, class and a box.

    Tiny ImageNet's val/. Raises DataMissing if the table is missing, of another format, or does not match the images."""
    table = root / split / annotations
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")]
    except (OSError, IndexError, UnicodeDecodeError, csv.Error) as problem:
        raise DataMissing(f"{table} cannot be read as lines of IMAGE, CLASS ({problem}): unpack the archive again.") from None
    present = set(images_below(root, split))
    names = [f"{split}/images/{name}" for name, _ in rows]
    if missing := sorted(set(names) - present):
        raise DataMissing(f"{root / missing[0]} is named in {table.name} and missing: unpack the archive again.")
    if not names:
        raise DataMissing(f"{table} is empty: unpack the archive again.")
    return Listing(names, [of for _, of in rows])


def _one_small_size(root: Path, classes: Sequence[str]) -> int | None:
    first = (next(images_below(root, f"train/{name}"), None) for name in classes[:LOOKED_AT])
    size = common_size([str(root / name) for name in first if name is not None])
    return size if size is not None and size <= SMALL_SIZE else None
