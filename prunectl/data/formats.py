"""The files that small data sets come in, read into (images, labels): uint8 (N, C, H, W) and int64 (N,).

IDX (MNIST and its kin, raw or gzip) and CIFAR's binary batches here; CIFAR's pickled batches in cifar_pickle.py and
SVHN's MATLAB files in matfile.py. Every reader takes the bytes and the name to blame, checks the sizes that the format
states, and raises DataMissing with that name; none of them ever executes anything a file says."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from prunectl.data.draws import Index
from prunectl.data.images import Pixels
from prunectl.errors import DataMissing

IDX_UINT8 = 0x08


def damaged(name: object, problem: str) -> DataMissing:
    return DataMissing(f"{name}: {problem}; the file is truncated, damaged or of another format: get it again.")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file, gzip or raw.

    Layout (http://yann.lecun.com/exdb/mnist): two zero bytes, the type (8 = uint8), the number of dimensions, each
    dimension as a big-endian 32-bit number, the values."""
    raw = _read(path)
    if raw[:2] == b"\x1f\x8b":
        raw = _gunzipped(raw, path)
    if len(raw) < 4 or raw[:3] != bytes([0, 0, IDX_UINT8]):
        raise damaged(path, f"starts with {raw[:4].hex(' ') or 'nothing'} where an IDX file of bytes starts with 00 00 08")
    if not 1 <= raw[3] <= 3:
        raise damaged(path, f"has {raw[3]} dimensions where labels have 1 and images 3")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise damaged(path, f"ends after {len(raw)} bytes, inside its header")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], offset=4))
    expected = start + int(np.prod(shape, dtype=object))
    if len(raw) != expected:
        raise damaged(path, f"its header announces {expected} bytes and it has {len(raw)}")
    try:
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    except ValueError:  # a size of 0 lets the others be anything
        raise damaged(path, f"its header announces an array of shape {shape}") from None


def read_mnist_pair(images: Path, labels: Path) -> tuple[Pixels, Index]:
    """The (N, 1, 28, 28) images of one IDX file with the labels of another."""
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28):
        raise damaged(images, f"holds an array of shape {pixels.shape} where N x 28 x 28 is expected")
    if classes.shape != pixels.shape[:1]:
        raise damaged(labels, f"has labels of shape {classes.shape} for {len(pixels)} images in {images.name}")
    return pixels[:, None], classes.astype(np.int64)


def parse_cifar_binary(raw: bytes, name: str, label_bytes: int) -> tuple[Pixels, Index]:
    """One `.bin` batch: records of `label_bytes` labels (the last one counts) and 3 x 32 x 32 pixels.

    Layout: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version"."""
    record = label_bytes + 3072
    if not raw or len(raw) % record:
        raise damaged(name, f"has {len(raw)} bytes, which is no whole number of {record}-byte records")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].astype(np.int64)


def member_reader(path: Path) -> Callable[[str], bytes]:
    """name -> content, for the files of a folder or, unpacked in memory, of a .tar.gz."""
    if path.is_dir():
        return lambda name: _read(path / name)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    contents[PurePosixPath(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as problem:
        raise damaged(path, f"cannot be unpacked ({problem})") from None

    def read(name: str) -> bytes:
        if name not in contents:
            raise damaged(path, f"holds no {name}")
        return contents[name]

    return read


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataMissing(f"{path} is missing: put it there, or remove the folder and let it be downloaded again.") from None
    except OSError as problem:
        raise DataMissing(f"{path} cannot be read ({problem.strerror}).") from None


def _gunzipped(raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as problem:
        raise damaged(path, f"cannot be decompressed ({problem})") from None
