"""Small files in the true formats of the published data sets, written without the package's own code."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Noise, so that no two images are equal."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, suffix: str = ".gz", n_train: int = 60, n_test: int = 23) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        for kind, array in (("images-idx3", pixels(n, 28, 28, seed=n)), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            content = idx(array)
            (folder / f"{prefix}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)


def _py2_str(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def _py2_int(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def cifar_pickle(data: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """A batch as Python 2's cPickle writes it with protocol 2: byte strings, old module names."""
    dtype = b"cnumpy\ndtype\n" + _py2_str(b"u1") + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _py2_str(b"b") + b"\x87R"
    shape = _py2_int(data.shape[0]) + _py2_int(data.shape[1]) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + _py2_str(data.tobytes()) + b"tb"
    items = _py2_str(b"data") + array + state + _py2_str(key) + b"](" + b"".join(map(_py2_int, labels)) + b"e"
    return b"\x80\x02}(" + items + _py2_str(b"batch_label") + _py2_str(b"testing batch 1 of 1") + b"u."


def cifar_batch(n: int, seed: int, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    return pixels(n, 3072, seed=seed), [k % classes for k in range(n)]


def cifar_files(*, hundred: bool, binary: bool, n: int = 20) -> dict[str, bytes]:
    names = ("train", "test") if hundred else (*CIFAR_TRAIN, "test_batch")
    files = {}
    for seed, name in enumerate(names):
        data, labels = cifar_batch(n, seed)
        if binary:
            head = [[7, k] if hundred else [k] for k in labels]
            files[f"{name}.bin"] = b"".join(bytes(h) + row.tobytes() for h, row in zip(head, data, strict=True))
        else:
            files[name] = cifar_pickle(data, labels, b"fine_labels" if hundred else b"labels")
    return files


def write_cifar(folder: Path, *, hundred: bool = False, binary: bool = False) -> Path:
    """The folder that the official archive unpacks to, inside `folder`."""
    inside = folder / {(False, False): "cifar-10-batches-py", (False, True): "cifar-10-batches-bin",
                       (True, False): "cifar-100-python", (True, True): "cifar-100-binary"}[hundred, binary]  # fmt: skip
    inside.mkdir(parents=True)
    for name, content in cifar_files(hundred=hundred, binary=binary).items():
        (inside / name).write_bytes(content)
    return inside


def tar(path: Path, files: dict[str, bytes], prefix: str) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{prefix}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _mat_element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _mat_array(name: str, array: np.ndarray) -> bytes:
    """A uint8 matrix: flags (class 9), shape, name in the short form where it fits, values column by column."""
    label = name.encode()
    short = struct.pack("<HH", 1, len(label)) + label.ljust(4, b"\0")
    body = _mat_element(6, struct.pack("<II", 9, 0)) + _mat_element(5, struct.pack(f"<{array.ndim}i", *array.shape))
    return _mat_element(14, body + short + _mat_element(2, array.tobytes(order="F")))


def mat(arrays: dict[str, np.ndarray], *, compressed: bool) -> bytes:
    parts = [_mat_array(name, array) for name, array in arrays.items()]
    if compressed:
        parts = [struct.pack("<II", 15, len(z)) + z for z in map(zlib.compress, parts)]
    return b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x01IM" + b"".join(parts)


def write_svhn(folder: Path, *, compressed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 60), ("test", 23)):
        labels = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]  # 1 ... 10, where 10 is the digit 0
        (folder / f"{part}_32x32.mat").write_bytes(
            mat({"X": pixels(n, 32, 32, 3, seed=n).transpose(1, 2, 3, 0), "y": labels}, compressed=compressed)
        )


def save(path: Path, size: tuple[int, int], *, seed: int, mode: str = "RGB") -> None:
    """An image of random blocks, which JPEG keeps apart; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = Image.fromarray(pixels(1, 6, 6, 3, seed=seed)[0]).resize(size, Image.Resampling.NEAREST)
    blocks.convert(mode).save(path)


def write_tiny_imagenet(root: Path, *, classes: int = 3) -> None:
    wnids = [f"n0144{k}764" for k in range(classes)]
    for c, wnid in enumerate(wnids):
        for k in range(8):
            save(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", (64, 64), seed=100 * c + k, mode="L" if k == 3 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for k in range(7):
        save(root / "val" / "images" / f"val_{k}.JPEG", (64, 64), seed=900 + k)
        lines.append(f"val_{k}.JPEG\t{wnids[k % classes]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    save(root / "test" / "images" / "test_0.JPEG", (64, 64), seed=1000)
    (root / "wnids.txt").write_text("\n".join(wnids))


def write_imagenet(root: Path, *, classes: int = 3, per_class: int = 8) -> None:
    """JPEGs of several sizes and both orientations, one grey, one CMYK, as ImageNet has them."""
    sizes = [(90, 60), (60, 90), (64, 64), (120, 50), (51, 49)]
    for c in range(classes):
        wnid = f"n0144{c}764"
        for k in range(per_class):
            mode = {(0, 1): "L", (1, 2): "CMYK"}.get((c, k), "RGB")
            save(root / "train" / wnid / f"{wnid}_{k}.JPEG", sizes[k % 5], seed=50 * c + k, mode=mode)
        for k in range(3):
            save(root / "val" / wnid / f"ILSVRC2012_val_{c}{k}.JPEG", sizes[k], seed=5000 + 50 * c + k)
