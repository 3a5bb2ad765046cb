"""Published formats: the true bytes are read, anything else is one sentence that names the file."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from true_formats import CIFAR_TRAIN, cifar_batch, cifar_files, cifar_pickle, idx, mat, pixels, tar, write_cifar, write_mnist, write_svhn

from prunectl.data import load
from prunectl.data.cifar_pickle import parse_cifar_pickle
from prunectl.data.formats import parse_cifar_binary, read_idx
from prunectl.data.matfile import read_mat
from prunectl.errors import DataMissing

HERE = Path(__file__).parent


def everything(ds) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels and labels of the training and validation images, then of the test images, in file order."""
    pool = ds.stream.args[0].pool
    return pool.images, pool.labels


def one_sentence(caught: pytest.ExceptionInfo, *parts: object) -> None:
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    for part in parts:
        assert str(part) in message


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["mnist", "", "mnist/raw", "MNIST/raw"])
def test_mnist_is_found_where_people_have_it(tmp_path, suffix, inside):
    write_mnist(tmp_path / inside, suffix=suffix)
    ds = load("mnist", data_dir=tmp_path)
    images, labels = everything(ds)
    assert np.array_equal(images[:60, 0], pixels(60, 28, 28, seed=60)) and np.array_equal(images[60:, 0], pixels(23, 28, 28, seed=23))
    assert np.array_equal(labels, [*np.arange(60) % 10, *np.arange(23) % 10])
    assert (ds.info.n_train, ds.info.n_val, ds.info.n_test) == (50, 10, 23)


def test_data_dir_comes_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "env" / "mnist", n_train=40)
    write_mnist(tmp_path / "arg" / "mnist", n_train=20)
    monkeypatch.setenv("PRUNECTL_DATA", str(tmp_path / "env"))
    assert load("mnist").info.n_train == 30
    assert load("mnist", data_dir=tmp_path / "arg").info.n_train == 10


def test_fashion_mnist_prefers_the_folder_given(tmp_path):
    write_mnist(tmp_path)
    assert load("fashion_mnist", data_dir=tmp_path).info.n_test == 23


@pytest.mark.parametrize("keep", [0, 3, 10, 1000, -1])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_truncated_idx_file_is_named(tmp_path, keep, suffix):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    whole = idx(pixels(60, 28, 28))
    path.write_bytes((gzip.compress(whole) if suffix else whole)[:keep])
    with pytest.raises(DataMissing) as caught:
        read_idx(path)
    one_sentence(caught, path, "get it again")


def test_a_flipped_bit_in_gzip_is_noticed(tmp_path):
    content = bytearray(gzip.compress(idx(pixels(60, 28, 28))))
    content[len(content) // 2] ^= 4
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(DataMissing, match=r"x\.gz"):
        read_idx(tmp_path / "x.gz")


def test_clothes_are_not_taken_for_digits(tmp_path):
    """The files of MNIST and Fashion-MNIST have the same names, and either may lie in the folder that was named."""
    write_mnist(tmp_path)
    clothes = np.array([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, *range(10), 0, 1, 2], np.uint8)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(clothes)))
    with pytest.raises(DataMissing, match=r"holds FashionMNIST.*--data-dir"):
        load("mnist", data_dir=tmp_path)
    assert load("fashion-mnist", data_dir=tmp_path).info.n_test == 23


def test_labels_of_another_length_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(59, np.uint8))))
    with pytest.raises(DataMissing) as caught:
        load("mnist", data_dir=tmp_path)
    one_sentence(caught, "train-labels-idx1-ubyte.gz", "(59,)", "60 images")


def test_images_offered_as_labels_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataMissing, match=r"shape \(60,\) where N x 28 x 28"):
        load("mnist", data_dir=tmp_path)


def test_labels_that_are_no_class_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(60, 11, np.uint8))))
    with pytest.raises(DataMissing, match="labels 0 to 11 where 0 to 9"):
        load("mnist", data_dir=tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels(23, 20, 20))))
    with pytest.raises(DataMissing, match=r"t10k-images.*\(23, 20, 20\) where N x 28 x 28"):
        load("mnist", data_dir=tmp_path)


# CIFAR


def test_the_pickle_writer_of_these_tests_writes_what_numpy_reads():
    data, labels = cifar_batch(5, 1)
    batch = pickle.loads(cifar_pickle(data, labels), encoding="latin1")  # our own bytes
    assert np.array_equal(batch["data"], data) and batch["labels"] == labels


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("form", ["pickled", "binary", "pickled tar", "binary tar", "the folder itself"])
def test_cifar_in_every_form_is_the_same(tmp_path, hundred, form):
    name, stem = ("cifar100", "cifar-100") if hundred else ("cifar10", "cifar-10")
    binary = form.startswith("binary")
    if form.endswith("tar"):
        archive = tmp_path / f"{stem}-{'binary' if binary else 'python'}.tar.gz"
        tar(archive, cifar_files(hundred=hundred, binary=binary), f"{stem}-anything")
        ds = load(name, data_dir=tmp_path)
    else:
        folder = write_cifar(tmp_path / name, hundred=hundred, binary=binary)
        ds = load(name, data_dir=folder if form == "the folder itself" else tmp_path)
    images, labels = everything(ds)
    n = 2 if hundred else 6
    assert np.array_equal(images.reshape(-1, 3072), np.concatenate([cifar_batch(20, seed)[0] for seed in range(n)]))
    assert labels.tolist() == [k % 10 for k in range(20)] * n
    assert ds.info.n_test == 20


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_pickled_anew_by_python_3_are_read(protocol):
    data, labels = cifar_batch(6, 3)
    images, got = parse_cifar_pickle(pickle.dumps({"data": data, "labels": labels}, protocol=protocol), "batch", "labels")
    assert np.array_equal(images.reshape(6, -1), data) and got.tolist() == labels


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_array_in_columns_is_read_as_one(protocol):
    data, labels = cifar_batch(6, 3)
    raw = pickle.dumps({"data": np.asfortranarray(data), "labels": labels}, protocol=protocol)
    images, _ = parse_cifar_pickle(raw, "batch", "labels")
    assert np.array_equal(images.reshape(6, -1), data)


def test_a_pickle_that_asks_for_more_memory_than_it_fills_is_refused():
    with pytest.raises(DataMissing, match="numbers an object"):
        parse_cifar_pickle(b"\x80\x02}r\xff\xff\xff\x7f.", "batch", "labels")


@pytest.mark.parametrize("shape", [[1] * 255, [2**32 - 1, 2**32 - 1, 0]])
def test_an_impossible_shape_is_named(tmp_path, shape):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes((0 in shape and 0) or 1))
    with pytest.raises(DataMissing) as caught:
        read_idx(path)
    one_sentence(caught, path)


def test_a_matlab_file_of_boxes_in_boxes_is_refused(tmp_path):
    inner = b""
    for _ in range(3000):
        z = zlib.compress(inner)
        inner = struct.pack("<II", 15, len(z)) + z
    (tmp_path / "x.mat").write_bytes(mat({}, compressed=False) + inner)
    with pytest.raises(DataMissing, match="compressed element"):
        read_mat(tmp_path / "x.mat")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    folder = write_cifar(tmp_path)
    evil, trace = pickle.dumps({"data": Malicious(tmp_path / "executed"), "labels": [0]}), tmp_path / "executed"
    (folder / "data_batch_3").write_bytes(evil)
    with pytest.raises(DataMissing) as caught:
        load("cifar10", data_dir=tmp_path)
    one_sentence(caught, folder / "data_batch_3", "mkdir", "nothing was executed")
    assert not trace.exists()
    pickle.loads(evil)  # the same bytes do execute in an ordinary unpickler
    assert trace.exists()


def test_numpys_own_door_to_objects_is_shut():
    objects = pickle.dumps({"data": np.array([[1, "a"]], dtype=object), "labels": [0]}, protocol=2)
    with pytest.raises(DataMissing, match="no CIFAR batch"):
        parse_cifar_pickle(objects, "batch", "labels")


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x80\x02}.", b"hello", b"\x80\x04N.", b"\x80\x02]q\x00.", bytes(300)])
def test_other_bytes_are_no_batch(raw):
    with pytest.raises(DataMissing) as caught:
        parse_cifar_pickle(raw, "data_batch_1", "labels")
    one_sentence(caught, "data_batch_1")


def test_every_truncation_of_a_pickle_is_refused():
    whole = cifar_pickle(*cifar_batch(1, 0))
    for keep in range(len(whole)):
        with pytest.raises(DataMissing):
            parse_cifar_pickle(whole[:keep], "batch", "labels")


def test_a_missing_or_cut_batch_is_named(tmp_path):
    folder = write_cifar(tmp_path, binary=True)
    (folder / "data_batch_2.bin").write_bytes((folder / "data_batch_2.bin").read_bytes()[:-1])
    with pytest.raises(DataMissing) as caught:
        load("cifar10", data_dir=tmp_path)
    one_sentence(caught, folder / "data_batch_2.bin", "61459 bytes", "3073-byte")
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(DataMissing) as caught:
        load("cifar10", data_dir=tmp_path)
    one_sentence(caught, folder / "data_batch_2.bin", "missing")


def test_a_cut_or_foreign_archive_is_named(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    tar(archive, cifar_files(hundred=False, binary=False), "cifar-10-batches-py")
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        archive.write_bytes(content)
        with pytest.raises(DataMissing) as caught:
            load("cifar10", data_dir=tmp_path)
        one_sentence(caught, archive, "get it again")
    tar(archive, {name: b"" for name in CIFAR_TRAIN}, "x")
    with pytest.raises(DataMissing, match="data_batch_1"):
        load("cifar10", data_dir=tmp_path)


def test_cifar_binary_labels_are_the_fine_ones():
    record = bytes([3, 77]) + bytes(3072)
    images, labels = parse_cifar_binary(record * 2, "train.bin", 2)
    assert labels.tolist() == [77, 77] and images.shape == (2, 3, 32, 32)


# MATLAB


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn_is_read_image_by_image(tmp_path, compressed):
    write_svhn(tmp_path / "svhn", compressed=compressed)
    images, labels = everything(load("svhn", data_dir=tmp_path))
    assert np.array_equal(images[:60], pixels(60, 32, 32, 3, seed=60).transpose(0, 3, 1, 2))
    assert labels[:12].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]  # 10 stands for the digit 0


def test_a_file_written_by_scipy_is_read():
    """svhn_by_scipy.mat: scipy.io.savemat(..., {"X": X, "y": y}, do_compression=True) of scipy 1.x."""
    arrays = read_mat(HERE / "svhn_by_scipy.mat")
    h, w, c, n = np.meshgrid(np.arange(32), np.arange(32), np.arange(3), np.arange(7), indexing="ij")
    assert np.array_equal(arrays["X"], (h + 2 * w + 50 * c + 7 * n) % 256)
    assert arrays["y"].tolist() == [[1], [10], [3], [4], [9], [10], [2]]


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_of_a_mat_file_is_refused(tmp_path, compressed):
    path = tmp_path / "train_32x32.mat"
    whole = mat({"X": pixels(1, 2, 2, 3)}, compressed=compressed)
    for keep in range(len(whole) - 4):  # the last four bytes are padding, or zlib's checksum
        if keep != 128:  # a file that ends after its header is an empty one
            path.write_bytes(whole[:keep])
            with pytest.raises(DataMissing, match="train_32x32"):
                read_mat(path)


def test_other_mat_files_are_refused(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    good = path.read_bytes()
    hdf5 = good[:124] + b"\x00\x02IM" + good[128:]
    no_y = mat({"X": pixels(32, 32, 3, 5)}, compressed=True)
    short = mat({"X": pixels(32, 32, 3, 5), "y": np.ones((4, 1), np.uint8)}, compressed=True)
    other = mat({"X": pixels(28, 28, 1, 5), "y": np.ones((5, 1), np.uint8)}, compressed=True)
    for content in (hdf5, no_y, short, other, b""):
        path.write_bytes(content)
        with pytest.raises(DataMissing) as caught:
            load("svhn", data_dir=tmp_path)
        one_sentence(caught, path)
