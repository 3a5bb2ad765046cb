from __future__ import annotations

import pytest
import torchvision.datasets as published

NOWHERE = "http://127.0.0.1:9/"  # nothing listens there, so a download ends at once


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no data set of this machine's user."""
    monkeypatch.setenv("PRUNECTL_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(published.MNIST, "mirrors", [NOWHERE, NOWHERE])
    monkeypatch.setattr(published.FashionMNIST, "mirrors", [NOWHERE])
    monkeypatch.setattr(published.CIFAR10, "url", NOWHERE + "cifar-10-python.tar.gz")
    monkeypatch.setattr(published.CIFAR100, "url", NOWHERE + "cifar-100-python.tar.gz")
    monkeypatch.setattr(
        published.SVHN, "split_list", {part: [f"{NOWHERE}{part}_32x32.mat", f"{part}_32x32.mat", "0"] for part in ("train", "test")}
    )
