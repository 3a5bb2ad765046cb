"""CIFAR's official batches are Python pickles; this reads them without running what they name.

A pickle may call any function it can import. Here the few names that a CIFAR batch uses all resolve to stand-ins of our
own, which only write down what they were called with, and any other name ends the reading. The pixels are then taken
from those notes, so not even NumPy's own reconstruction code runs on a stranger's bytes."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, Literal

import numpy as np

from prunectl.data.draws import Index
from prunectl.data.formats import damaged
from prunectl.data.images import Pixels


class _Dtype:
    """Stands in for numpy.dtype; remembers its code, e.g. `u1`."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray; remembers its shape, type code and bytes."""

    shape: Any = ()
    code: Any = None
    content: Any = b""
    order: Literal["C", "F"] = "C"

    def __setstate__(self, state: Any) -> None:
        _version, self.shape, dtype, fortran, self.content = state
        self.code, self.order = dtype.code, "F" if fortran else "C"


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, _encoding: str) -> bytes:
    """Bytes as protocol 2 of Python 3 writes them: `codecs.encode(text, "latin1")`."""
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does; nothing was executed") from None


def _check_memo(raw: bytes) -> None:
    """Raises ValueError for an index that would make the unpickler reserve more places than the file has bytes."""
    for operation, argument, _ in pickletools.genops(raw):
        if operation.name.endswith("PUT") and int(argument or 0) > len(raw):
            raise ValueError(f"it numbers an object {argument}")


def parse_cifar_pickle(raw: bytes, name: str, labels_key: str) -> tuple[Pixels, Index]:
    """One pickled batch: `data`, uint8 (N, 3072), and the list `labels_key` (`labels` or `fine_labels`).

    Layout: https://www.cs.toronto.edu/~kriz/cifar.html, "Python version". Raises DataMissing if it is anything else."""
    try:
        _check_memo(raw)
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        array, labels = fields["data"], np.array(fields[labels_key], dtype=np.int64)
        content = array.content.encode("latin1") if isinstance(array.content, str) else array.content
        if array.code not in ("u1", b"u1") or len(array.shape) != 2 or array.shape[1] != 3072 or labels.shape != array.shape[:1]:
            raise ValueError(f"data of type {array.code} and shape {array.shape} for labels of shape {labels.shape}")
        return np.frombuffer(content, np.uint8).reshape(array.shape, order=array.order).reshape(-1, 3, 32, 32), labels
    except KeyError as missing:
        raise damaged(name, f"has no entry {missing}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as problem:
        raise damaged(name, f"is no CIFAR batch ({problem})") from None
