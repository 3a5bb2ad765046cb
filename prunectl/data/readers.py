"""How each published small data set is found on disk, fetched if it is not there, and read into memory."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunectl.data import download
from prunectl.data.cifar_pickle import parse_cifar_pickle
from prunectl.data.download import Remote
from prunectl.data.draws import Index
from prunectl.data.formats import damaged, member_reader, parse_cifar_binary, read_mnist_pair
from prunectl.data.images import Pixels
from prunectl.data.matfile import read_mat
from prunectl.data.memory import MemoryPool
from prunectl.data.source import Place, Raw
from prunectl.errors import DataMissing, NotDownloaded

EMBEDDED = Path(__file__).parent / "embedded" / "fashion-mini.npz"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist

FIRST_TEST_LABELS = {"MNIST": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], "FashionMNIST": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}

Labelled = tuple[Pixels, Index]


def read_embedded() -> Raw:
    """The archive that comes with the package."""
    try:
        with np.load(EMBEDDED, allow_pickle=False) as arrays:
            train, test = ((arrays[f"{split}_images"][:, None], arrays[f"{split}_labels"].astype(np.int64)) for split in ("train", "test"))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as problem:
        raise DataMissing(f"{EMBEDDED} is missing or damaged ({problem}): install prunectl again.") from None
    return _in_memory(train, test)


def read_mnist(place: Place, torchvision_name: str, *elsewhere: Path) -> Raw:
    """MNIST's four IDX files, raw or gzip, in the place, in torchvision's folders below it, or `elsewhere`."""
    inside = ("", "raw", f"{torchvision_name}/raw")
    folders = [folder / sub for folder in place.folders for sub in inside] + list(elsewhere)
    kinds = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    found = next((folder for folder in folders if any(_idx_file(folder, kind).exists() for kind in kinds)), None)
    if found is None or found == place.home:
        found = place.home
        if missing := [kind for kind in kinds if not _idx_file(found, kind).exists()]:
            _fetch(place, [_mnist_remote(torchvision_name, kind) for kind in missing])
    files = [_idx_file(found, kind) for kind in kinds]
    train, test = read_mnist_pair(*files[:2]), read_mnist_pair(*files[2:])
    whose = next((name for name, first in FIRST_TEST_LABELS.items() if test[1][:10].tolist() == first), torchvision_name)
    if whose != torchvision_name:
        raise DataMissing(f"{found} holds {whose}, and {place.name} has files of the same names: name its own folder with --data-dir.")
    return _in_memory(train, test)


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFAR sets: its file names without `.bin`, its labels, and torchvision's class for it."""

    train: tuple[str, ...]
    test: str
    labels_key: str
    label_bytes: int
    stem: str
    folders: tuple[str, str]  # pickled, binary
    torchvision_name: str


FIVE = tuple(f"data_batch_{k}" for k in range(1, 6))
CIFAR10 = Cifar(FIVE, "test_batch", "labels", 1, "cifar-10", ("cifar-10-batches-py", "cifar-10-batches-bin"), "CIFAR10")
CIFAR100 = Cifar(("train",), "test", "fine_labels", 2, "cifar-100", ("cifar-100-python", "cifar-100-binary"), "CIFAR100")


def read_cifar(place: Place, which: Cifar) -> Raw:
    """CIFAR as its authors publish it: pickled or binary batches, in their folder or still in the archive."""
    pickled, binary = which.folders
    archives = f"{which.stem}-python.tar.gz", f"{which.stem}-binary.tar.gz"
    found = place.find(pickled, binary, *archives)
    if found is None:
        found = _batch_folder(place, which)
    if found is None:
        from torchvision import datasets as published

        official = getattr(published, which.torchvision_name)
        _fetch(place, [Remote((official.url,), official.filename, official.tgz_md5)])
        found = place.home / official.filename
    read = member_reader(found)
    is_binary = found.name in (binary, archives[1]) or (found.is_dir() and (found / f"{which.test}.bin").exists())

    def batch_of(name: str) -> Labelled:
        if is_binary:
            return parse_cifar_binary(read(f"{name}.bin"), f"{found}/{name}.bin", which.label_bytes)
        return parse_cifar_pickle(read(name), f"{found}/{name}", which.labels_key)

    parts = [batch_of(name) for name in which.train]
    return _in_memory((np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])), batch_of(which.test))


def _batch_folder(place: Place, which: Cifar) -> Path | None:
    """The folder itself, if it was the folder of the batches that was named."""
    for folder in place.folders:
        for suffix in ("", ".bin"):
            if all((folder / f"{name}{suffix}").is_file() for name in (*which.train, which.test)):
                return folder
    return None


def read_svhn(place: Place) -> Raw:
    """SVHN's cropped digits; the `extra` images are not used."""
    return _in_memory(_read_svhn_part(place, "train"), _read_svhn_part(place, "test"))


def _read_svhn_part(place: Place, part: str) -> Labelled:
    path = place.find(f"{part}_32x32.mat")
    if path is None:
        from torchvision.datasets import SVHN

        url, name, md5 = SVHN.split_list[part]
        _fetch(place, [Remote((url,), name, md5)])
        path = place.home / name
    arrays = read_mat(path)
    if "X" not in arrays or "y" not in arrays or arrays["X"].shape[:3] != (32, 32, 3) or arrays["X"].dtype != np.uint8:
        raise damaged(path, "has no X of 32 x 32 x 3 x N bytes with labels y")
    images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
    labels = arrays["y"].reshape(-1).astype(np.int64)
    if len(labels) != len(images):
        raise damaged(path, f"has {len(labels)} labels for {len(images)} images")
    return images, labels % 10  # the digit 0 is labelled 10


def _fetch(place: Place, remotes: list[Remote]) -> None:
    if not place.downloads:
        raise NotDownloaded(f"{place.name} is not in {place.home} yet: a run would download it.")
    download.fetch(place.name, remotes, place.home)


def _in_memory(train: Labelled, test: Labelled) -> Raw:
    pool = MemoryPool(np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]]))
    return Raw(pool, *np.split(np.arange(len(pool.labels)), [len(train[1])]))


def _idx_file(folder: Path, kind: str) -> Path:
    plain = folder / kind
    return plain if plain.exists() else folder / f"{kind}.gz"


def _mnist_remote(torchvision_name: str, kind: str) -> Remote:
    from torchvision import datasets as published

    official = getattr(published, torchvision_name)
    name = f"{kind}.gz"
    return Remote(tuple(mirror + name for mirror in official.mirrors), name, dict(official.resources)[name])
