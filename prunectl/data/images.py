"""What happens to pixels between the file and the network: shift, flip, crop, fit, normalise. Pure functions.

Images stay uint8 until the last step. Added borders are black pixels (0 before normalisation, as in torchvision's
`Pad` on an image), so that a device fed with uint8 images can add them too."""

from __future__ import annotations

from collections.abc import Sequence
from struct import error as struct_error
from zlib import error as zlib_error

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from prunectl.errors import DataMissing, UsageError

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

# The share of a photo's shorter side that evaluation keeps: resize to 256, crop 224 (Krizhevsky et al. 2012, and since).
MARGIN = 256 / 224

# What Pillow raises for a file that is cut off, damaged, no image, or too large to be one
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, struct_error, zlib_error, Image.DecompressionBombError)


def shifted(images: Pixels, dy: NDArray[np.int64], dx: NDArray[np.int64], padding: int) -> Pixels:
    """Each image's own window of the image with `padding` black pixels around it.

    images: (N, C, H, W); dy, dx: (N,) in [0, 2 * padding]; `padding` itself leaves an image where it was."""
    h, w = images.shape[2:]
    bordered = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(bordered, (h, w), axis=(2, 3))  # (N, C, 2p+1, 2p+1, H, W), no copy
    return windows[np.arange(len(images)), :, dy, dx]


def mirrored(images: Pixels, which: NDArray[np.bool_]) -> Pixels:
    """The images (N, C, H, W), those of `which` (N,) flipped left to right."""
    out = images.copy()
    out[which] = images[which][..., ::-1]
    return out


def fitted(images: Tensor, size: int, fit: str) -> Tensor:
    """Square uint8 images (N, C, S, S) brought to (N, C, size, size): `pad` adds a black border, `resize` is bilinear.

    An odd border is one pixel wider at the right and the bottom. Raises UsageError if a border would be negative."""
    gap = size - images.shape[-1]
    if gap == 0:
        return images
    if fit == "pad":
        if gap < 0:
            raise UsageError(f"images of {images.shape[-1]} pixels cannot be padded to {size}; fit='resize' shrinks them.")
        near, far = gap // 2, gap - gap // 2
        return F.pad(images, (near, far, near, far))
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=gap < 0)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels / 255 - mean) / std per channel: uint8 (N, C, H, W) -> float32."""
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).view(-1, 1, 1)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(-1, 1, 1)
    return images.to(torch.float32).mul_(scale).sub_(offset)


def random_box(width: int, height: int, u: NDArray[np.float64]) -> Box:
    """(left, top, right, bottom) of a window of 8 to 100 % of the area and aspect ratio 3/4 to 4/3.

    u: (4, tries) in [0, 1); the first try that lies inside the image counts, else the largest centred window of an
    allowed ratio. Szegedy et al., "Going deeper with convolutions", CVPR 2015, as in torchvision's RandomResizedCrop."""
    area = width * height * (0.08 + u[0] * 0.92)
    ratio = np.exp(np.log(3 / 4) + u[1] * (np.log(4 / 3) - np.log(3 / 4)))
    w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    inside = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    if not inside.any():
        return _centre(width, height, min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3)))
    k = int(inside.argmax())
    left, top = int(u[2, k] * (width - w[k] + 1)), int(u[3, k] * (height - h[k] + 1))
    return left, top, left + int(w[k]), top + int(h[k])


def windowed(image: Image.Image, box: Box, size: int) -> Image.Image:
    """`box` of the image, resized to size x size."""
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def centred(image: Image.Image, size: int, margin: float = MARGIN) -> Image.Image:
    """The size x size centre of the image after its shorter side became size * margin."""
    short = round(size * margin)
    w, h = image.size
    scaled = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    return image.crop(_centre(*image.size, size, size))


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in RGB (3 channels) or grey (1), from 8-bit grey, palette, CMYK, ... .

    Raises ValueError for 16- and 32-bit images: Pillow would clip them, not scale them."""
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode} pixels are not 8-bit; convert the image to 8 bits a channel")
    return image.convert("RGB" if channels == 3 else "L")


def preprocess(
    image: Image.Image | Pixels, *, channels: int, image_size: int, fit: str, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """One raw image as the network wants it: (1, C, H, W) float32, the way `Dataset` does it without augmentation.

    image: a PIL image, or uint8 (H, W) or (H, W, C). The keywords are DatasetInfo's fields of the same names.
    Raises UsageError if `fit` cannot bring its shape to image_size."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    image = as_mode(image, channels)
    if fit == "resize-crop":
        image = centred(image, image_size)
    elif image.width != image.height or (fit == "none" and image.width != image_size):
        raise UsageError(f"an image of {image.width}x{image.height} where {image_size}x{image_size} is expected: crop it first.")
    return normalised(fitted(torch.from_numpy(as_pixels(image)[None]), image_size, fit), mean, std)


def as_pixels(image: Image.Image) -> Pixels:
    """(C, H, W) of a grey or RGB image."""
    array = np.array(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def common_size(paths: Sequence[str]) -> int | None:
    """S if all these image files are S x S; None if they differ, are not square, or are none."""
    sizes = {_header_size(path) for path in paths}
    w, h = sizes.pop() if len(sizes) == 1 else (0, 1)
    return w if w == h else None


def _header_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE as problem:
        raise _unreadable(path, problem) from None


def read_rgb(path: str) -> Image.Image:
    """The decoded RGB image of a file. Raises DataMissing if there is none, or it is cut off or no image."""
    try:
        with Image.open(path) as image:
            return as_mode(image, 3)
    except UNREADABLE as problem:
        raise _unreadable(path, problem) from None


def _unreadable(path: str, problem: BaseException) -> DataMissing:
    reason = str(problem).replace(repr(path), "").strip(" :")  # the path stands in front already
    what = "missing" if isinstance(problem, FileNotFoundError) else f"not a readable image ({reason})"
    return DataMissing(f"{path} is {what}: replace it, or remove it before a run begins.")


def _centre(width: int, height: int, w: int, h: int) -> Box:
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h
