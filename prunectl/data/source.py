"""What a data set is before a byte of its images is read, and where its files may lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prunectl.data.dataset import Pool
from prunectl.data.draws import Index
from prunectl.errors import DataMissing


@dataclass(frozen=True)
class Raw:
    """A pool and the positions of its official parts; `val` only where the set comes with labelled images for it."""

    pool: Pool
    train: Index
    test: Index
    val: Index | None = None


@dataclass(frozen=True)
class Source:
    """`read(image_size)` gets the images; only photos look at the size they are wanted in.

    image_size: H = W of its images; for photos, which come in every size, what is usual. mean, std: per channel, of
    pixels / 255; None if they are to be measured. sizes: training and test images, of a set that can be downloaded."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    read: Callable[[int], Raw]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "crop-flip"
    val_fraction: float = 0.1
    photos: bool = False
    sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Place:
    """Where a data set may lie: in `base/name` or in `base` itself; a download, if it may be made, goes to the first."""

    name: str
    base: Path
    downloads: bool = True

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.base / self.name, self.base

    @property
    def home(self) -> Path:
        return self.base / self.name

    def find(self, *inside: str) -> Path | None:
        """The first of these names, in this order, that exists in either folder."""
        return next((folder / name for folder in self.folders for name in inside if (folder / name).exists()), None)

    def require(self, *inside: str, origin: str) -> Path:
        """As `find`; raises DataMissing, naming the folders and where the files come from, if there is none."""
        if (found := self.find(*inside)) is None:
            looked = " or ".join(str(folder) for folder in self.folders)
            raise DataMissing(
                f"{self.name}: no {inside[0]} in {looked}: get it from {origin} and put it there, "
                "or name its folder with --data-dir or $PRUNECTL_DATA."
            )
        return found
