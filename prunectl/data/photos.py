"""A pool of image files: decoded when they are asked for, by whoever makes the batch.

Names are kept as one array of bytes, not as Python strings: a million reference-counted objects would be copied, page
by page, into every worker process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prunectl.data.dataset import Augmentation, Pool, sha256_of
from prunectl.data.draws import Index, Stream, permutation, uniforms
from prunectl.data.images import MARGIN, Pixels, as_pixels, centred, random_box, read_rgb, windowed
from prunectl.data.listing import Listing
from prunectl.data.memory import MemoryPool, crop_flip
from prunectl.errors import DataMissing

CROP_TRIES = 10
CHUNK = 64
MEASURED_IMAGES = 512


@dataclass(frozen=True)
class PhotoPool:
    """root: the folder; names: (N,) paths below it; labels: int64 (N,).

    size: S of the pixels handed out. margin: the length, in S, that a shorter side gets before the centre is cut."""

    root: str
    names: NDArray[np.bytes_]
    labels: Index
    size: int
    margin: float

    def crops(self, index: Index, augmentation: Augmentation | None) -> Pixels:
        if augmentation is not None and augmentation.policy == "imagenet":
            return np.stack([as_pixels(self._random_window(int(i), augmentation)) for i in index])
        images = np.stack([as_pixels(centred(self._read(int(i)), self.size, self.margin)) for i in index])
        return crop_flip(images, index, augmentation)

    def fingerprint(self) -> str:
        return sha256_of(self.labels, self.names)

    def _read(self, i: int) -> Image.Image:
        return read_rgb(os.path.join(self.root, os.fsdecode(bytes(self.names[i]))))

    def _random_window(self, i: int, augmentation: Augmentation) -> Image.Image:
        """A random window of photo i, mirrored half the time."""
        u = uniforms((Stream.CROP, augmentation.seed, augmentation.epoch, i), np.arange(4 * CROP_TRIES + 1))
        image = self._read(i)
        image = windowed(image, random_box(*image.size, u[1:].reshape(4, CROP_TRIES)), self.size)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[0] < 0.5 else image


def pooled(
    root: Path, listings: Sequence[Listing], classes: Sequence[str], *, size: int, margin: float = MARGIN
) -> tuple[PhotoPool, list[Index]]:
    """One pool of all listings, and each one's positions in it.

    Raises DataMissing if a listing has a class that is not in `classes`."""
    number = {name: k for k, name in enumerate(classes)}
    for listing in listings:
        for name, of in zip(listing.names, listing.classes, strict=True):
            if of not in number:
                raise DataMissing(
                    f"{root / name}: its class '{of}' is not among the {len(classes)} classes of the training images; "
                    "remove or rename the folder."
                )
        if lacking := sorted(number.keys() - set(listing.classes)):
            example = str(Path(listing.names[0]).parts[0])
            raise DataMissing(
                f"{root / example} has no images of class '{lacking[0]}', which is among the {len(classes)} classes of the training images:"
                " add some, or remove the class."
            )
    names = np.array([os.fsencode(name) for listing in listings for name in listing.names], dtype=np.bytes_)
    labels = np.array([number[of] for listing in listings for of in listing.classes], dtype=np.int64)
    ends = np.cumsum([len(listing.names) for listing in listings])
    return PhotoPool(str(root), names, labels, size, margin), np.split(np.arange(len(names)), ends[:-1])


def decoded(pool: PhotoPool) -> MemoryPool:
    """The same images, held in memory."""
    images = np.empty((len(pool.names), 3, pool.size, pool.size), np.uint8)
    for start, chunk in zip(range(0, len(images), CHUNK), _threaded(pool, np.arange(len(images))), strict=True):
        images[start : start + CHUNK] = chunk
    return MemoryPool(images, pool.labels)


def measured(pool: Pool, index: Index) -> Mapping[str, tuple[float, ...]]:
    """Per-channel `mean` and `std` of pixels / 255 over a fixed sample of these positions, to four decimals.

    512 photos: the mean's standard error is about 0.01, a twentieth of the std."""
    chosen = index[permutation((Stream.SAMPLE, 0), len(index))[:MEASURED_IMAGES]]
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for chunk in _threaded(pool, chosen):
        values = chunk.astype(np.float64) / 255
        sums += values.sum(axis=(0, 2, 3))
        squares += (values**2).sum(axis=(0, 2, 3))
        count += values[:, 0].size
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1 / 255**2))  # a constant channel must not divide by zero
    return {"mean": tuple(np.round(mean, 4).tolist()), "std": tuple(np.round(std, 4).tolist())}


def _threaded(pool: Pool, index: Index) -> Iterator[Pixels]:
    """Unaugmented pixels, chunk by chunk; threads do, because Pillow decodes without the interpreter's lock."""
    chunks = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
    with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as threads:
        yield from threads.map(lambda chunk: pool.crops(chunk, None), chunks)
