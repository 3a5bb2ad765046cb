"""Numeric arrays of a MATLAB 5 `.mat` file, which is how SVHN is published; nothing else of that format.

Format: MathWorks, "MAT-File Format" (R2024a), chapter 1: a 128-byte header, then elements of type, size and data padded
to 8 bytes; compressed elements hold one more element; a matrix holds its flags, shape, name and column-major values."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.data.formats import damaged
from prunectl.errors import DataMissing

HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15
# miINT8 ... miUINT64: the type of the stored values, which may be narrower than the array's class
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}

Array = NDArray[Any]


def read_mat(path: Path) -> dict[str, Array]:
    """name -> array, in the stored type, for every numeric array of the file.

    Raises DataMissing if the file is missing, damaged, or of another version (7.3 is HDF5)."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise DataMissing(f"{path} cannot be read ({problem.strerror}).") from None
    if len(raw) < HEADER_BYTES or raw[126:128] not in (b"IM", b"MI") or raw[124:126] not in (b"\x00\x01", b"\x01\x00"):
        raise damaged(path, "has no MATLAB 5 header")
    order = "<" if raw[126:128] == b"IM" else ">"
    try:
        return dict(_matrices(raw[HEADER_BYTES:], order))
    except (zlib.error, struct.error, ValueError, KeyError, IndexError, StopIteration, UnicodeDecodeError) as problem:
        raise damaged(path, f"cannot be parsed ({problem})") from None


def _matrices(raw: bytes, order: str) -> Iterator[tuple[str, Array]]:
    for kind, data in _elements(raw, order):
        if kind == COMPRESSED:
            inside = zlib.decompress(data)
            if any(nested == COMPRESSED for nested, _ in _elements(inside, order)):
                raise ValueError("a compressed element in a compressed one")
            yield from _matrices(inside, order)
        elif kind == MATRIX:
            parts = list(_elements(data, order))
            (_, dims), (_, name), (stored, values) = parts[1:4]
            if stored in STORED:  # text and cells are passed over
                array = np.frombuffer(values, order + STORED[stored])
                yield name.decode("ascii"), array.reshape(np.frombuffer(dims, order + "i4"), order="F")


def _elements(raw: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element; up to four bytes of data may sit inside the tag itself."""
    at = 0
    while at < len(raw):
        (tag,) = struct.unpack_from(order + "I", raw, at)
        if tag >> 16:
            size, kind, start, end = tag >> 16, tag & 0xFFFF, at + 4, at + 8
        else:
            kind, start = tag, at + 8
            (size,) = struct.unpack_from(order + "I", raw, at + 4)
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(raw):
            raise ValueError(f"an element of {size} bytes starts {len(raw) - start} bytes before the end")
        yield kind, raw[start : start + size]
        at = end
