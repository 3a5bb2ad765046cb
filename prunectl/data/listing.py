"""Which image files a folder holds, and of which class: a class is a folder, its files may lie at any depth below."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import DataMissing

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


@dataclass(frozen=True)
class Listing:
    """The files of one split: paths below the root, and for each the name of its class."""

    names: list[str]
    classes: list[str]


def list_split(root: Path, split: str) -> Listing:
    """Every image of `root/split/CLASS/...`, sorted by class and name.

    Raises DataMissing if the folder is missing, has no class folders, or has one without images."""
    names: list[str] = []
    classes: list[str] = []
    for name in class_names(root / split):
        try:
            found = sorted(images_below(root, f"{split}/{name}"))
        except OSError as problem:
            raise DataMissing(f"{problem.filename} cannot be listed ({problem.strerror}): make it readable or remove it.") from None
        if not found:
            raise DataMissing(f"{root / split / name} holds no images ({', '.join(SUFFIXES)}): fill it or remove it.")
        names += found
        classes += [name] * len(found)
    return Listing(names, classes)


def class_names(folder: Path) -> list[str]:
    """The names of a split's class folders, sorted. Raises DataMissing if there are none."""
    expected = f"expected {folder}/CLASS/IMAGE.jpg for every class"
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        raise DataMissing(f"{folder} is missing: {expected}.") from None
    except OSError as problem:
        raise DataMissing(f"{folder} cannot be listed ({problem.strerror}): {expected}.") from None
    found = sorted(entry.name for entry in entries if _is_class(entry))
    if not found and any(entry.name.endswith(".tar") for entry in entries):
        raise DataMissing(f"{folder} holds .tar files and no class folders: unpack each into a folder of its name.")
    if not found and any(entry.name.startswith("ILSVRC2012_val_") for entry in entries):
        raise DataMissing(f"{folder} is ImageNet's flat folder: sort its images into {folder}/WNID/, as {VALPREP} does.")
    if not found:
        raise DataMissing(f"{folder} has {len(entries)} entries and no class folders: {expected}.")
    return found


def has_classes(folder: Path) -> bool:
    """Whether the folder is a labelled split; an unlabelled test set is one flat folder."""
    return folder.is_dir() and any(_is_class(entry) for entry in os.scandir(folder))


def images_below(root: Path, prefix: str) -> Iterator[str]:
    """The paths, below the root, of the images in `root/prefix` at any depth; hidden entries are skipped."""
    for entry in os.scandir(root / prefix):
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(SUFFIXES):
            yield f"{prefix}/{entry.name}"
        elif entry.is_dir():
            yield from images_below(root, f"{prefix}/{entry.name}")


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")
