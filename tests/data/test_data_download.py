"""Downloads: from a real server on loopback; a failure says what to put where and leaves no half file behind."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torchvision.datasets as published
from true_formats import cifar_files, tar, write_mnist

from prunectl.data import load
from prunectl.errors import DataMissing


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """(folder, address) of a server."""
    folder = tmp_path / "server"
    folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{http.server_port}/"
    http.shutdown()
    thread.join()
    http.server_close()


def md5(path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_cifar_is_downloaded_once(server, tmp_path, monkeypatch, capsys):
    folder, address = server
    archive = folder / "cifar-10-python.tar.gz"
    tar(archive, cifar_files(hundred=False, binary=False), "cifar-10-batches-py")
    monkeypatch.setattr(published.CIFAR10, "url", address + archive.name)
    monkeypatch.setattr(published.CIFAR10, "tgz_md5", md5(archive))
    first = load("cifar10", data_dir=tmp_path / "d").info
    archive.unlink()
    assert load("cifar10", data_dir=tmp_path / "d").info == first
    assert (tmp_path / "d" / "cifar10" / archive.name).exists()
    assert capsys.readouterr().out == ""  # stdout belongs to the caller's --json


def test_mnist_comes_from_the_second_mirror_and_only_what_is_missing(server, tmp_path, monkeypatch):
    folder, address = server
    write_mnist(folder)
    monkeypatch.setattr(published.MNIST, "mirrors", ["http://127.0.0.1:9/", address])
    monkeypatch.setattr(published.MNIST, "resources", [(path.name, md5(path)) for path in sorted(folder.iterdir())])
    home = tmp_path / "d" / "mnist"
    write_mnist(home)
    kept = (home / "train-images-idx3-ubyte.gz").stat().st_mtime_ns
    (home / "t10k-labels-idx1-ubyte.gz").unlink()
    assert load("mnist", data_dir=tmp_path / "d").info.n_test == 23
    assert (home / "train-images-idx3-ubyte.gz").stat().st_mtime_ns == kept


def test_a_download_with_another_checksum_is_thrown_away(server, tmp_path, monkeypatch):
    folder, address = server
    (folder / "cifar-10-python.tar.gz").write_bytes(b"something else")
    monkeypatch.setattr(published.CIFAR10, "url", address + "cifar-10-python.tar.gz")
    with pytest.raises(DataMissing, match="could not be downloaded"):
        load("cifar10", data_dir=tmp_path / "d")
    assert [p.name for p in (tmp_path / "d" / "cifar10").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_without_network_the_file_and_its_place_are_named(tmp_path, name, file):
    with pytest.raises(DataMissing) as caught:
        load(name, data_dir=tmp_path / "d")
    message = str(caught.value)
    assert "\n" not in message and file in message and str(tmp_path / "d" / name) in message and "127.0.0.1:9" in message
    assert "refused" in message


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataMissing, match="could not be downloaded"):
        load("cifar10", data_dir=tmp_path / "file")


@pytest.mark.parametrize(("name", "origin"), [("tiny-imagenet", "tiny-imagenet-200.zip"), ("imagenet", "image-net.org")])
def test_what_cannot_be_downloaded_says_where_it_comes_from(tmp_path, name, origin):
    with pytest.raises(DataMissing) as caught:
        load(name, data_dir=tmp_path)
    assert origin in str(caught.value) and str(tmp_path / name) in str(caught.value) and "--data-dir" in str(caught.value)
