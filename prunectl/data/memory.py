"""Small data sets: all images in memory as uint8, a batch made by array operations without a loop over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.data.dataset import Augmentation, Batch, Request, View, sha256_of
from prunectl.data.draws import Index, Stream, integers, uniforms
from prunectl.data.images import Pixels, mirrored, shifted
from prunectl.errors import UsageError


@dataclass(frozen=True)
class MemoryPool:
    """images: uint8 (N, C, S, S); labels: int64 (N,)."""

    images: Pixels
    labels: Index

    def crops(self, index: Index, augmentation: Augmentation | None) -> Pixels:
        return crop_flip(self.images[index], index, augmentation)

    def fingerprint(self) -> str:
        return sha256_of(self.labels, self.images)


def blank(n: int, classes: int, channels: int, size: int) -> MemoryPool:
    """Images without content that take no memory: what is counted on them holds for the real ones."""
    return MemoryPool(np.broadcast_to(np.uint8(0), (n, channels, size, size)), np.arange(n) % classes)


def crop_flip(images: Pixels, index: Index, augmentation: Augmentation | None) -> Pixels:
    """The images (N, C, S, S) of the pool's positions `index`, shifted by up to S/8 pixels and mirrored half the time.

    The standard CIFAR augmentation (He et al., CVPR 2016, Sec. 4.2: 4 pixels at 32); `crop` only shifts, `flip` only mirrors.
    Raises UsageError for `imagenet`, which needs photos larger than what the network sees."""
    if augmentation is None or augmentation.policy == "none":
        return images
    if augmentation.policy == "imagenet":
        raise UsageError("data.augment = imagenet needs a data set of photos: use crop-flip, crop, flip or none.")
    key = (augmentation.seed, augmentation.epoch)
    if "crop" in augmentation.policy:
        padding = (images.shape[-1] + 4) // 8
        dy = integers((Stream.SHIFT_Y, *key), index, 2 * padding + 1)
        dx = integers((Stream.SHIFT_X, *key), index, 2 * padding + 1)
        images = shifted(images, dy, dx, padding)
    return mirrored(images, uniforms((Stream.FLIP, *key), index) < 0.5) if "flip" in augmentation.policy else images


def in_process(view: View, requests: Sequence[Request]) -> Iterator[Batch]:
    """The batches, each made when it is asked for."""
    return (view[request] for request in requests)
