"""`find-ticket resnet50 imagenet` on a folder in ImageNet's true layout: JPEGs of every size, one grey, one CMYK, one cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import comparable, forked, only_run, prunectl, run_folders

import prunectl as package

WNIDS = ("n01440764", "n01443537", "n02102040")
SIZES = ((500, 375), (375, 500), (96, 128), (640, 427), (120, 90), (333, 500))
ODD = {("train", WNIDS[0], 1): "L", ("train", WNIDS[1], 2): "CMYK", ("val", WNIDS[2], 0): "L"}


def _photo(seed: int, size: tuple[int, int], mode: str) -> Image.Image:
    """Blurred noise: compresses like a photo and decodes as one."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def _tree(root: Path, *, per_class: int) -> Path:
    """root/imagenet/{train,val}/WNID/*.JPEG, named as the archives name them."""
    seed = 0
    for wnid in WNIDS:
        for i in range(per_class):
            path = root / "imagenet" / "train" / wnid / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            _photo(seed, SIZES[seed % len(SIZES)], ODD.get(("train", wnid, i), "RGB")).save(path, "JPEG", quality=90)
            seed += 1
        for i in range(2):
            path = root / "imagenet" / "val" / wnid / f"ILSVRC2012_val_{seed:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            _photo(seed, SIZES[seed % len(SIZES)], ODD.get(("val", wnid, i), "RGB")).save(path, "JPEG", quality=90)
            seed += 1
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return _tree(tmp_path_factory.mktemp("data"), per_class=8)


SMALL = ("model.width=0.125", "data.image_size=64", "data.val_fraction=0.2", "train.batch_size=6", "ticket.probe_images=6")


def _command(root: Path, out: Path, *flags: object) -> list[object]:
    sets = [part for s in (*SMALL, "train.lr=0.01", "ticket.probes_per_epoch=1") for part in ("--set", s)]
    base = ["find-ticket", "resnet50", "imagenet", "--data-dir", root, "--epochs", 2, "--detector", "epoch:1", "--workers", 0]
    return [*base, *sets, "--out", out, *flags]


def test_the_whole_way_with_a_death_in_the_middle(photos, tmp_path):
    printed = prunectl(*_command(photos, tmp_path / "whole", "--json"))
    assert printed.code == 0, printed
    result, run = printed.document, only_run(tmp_path / "whole")
    assert (result["outcome"], result["model"], result["dataset"]) == ("found", "resnet50", "imagenet")
    assert result["accuracy"]["final"] is not None and run.name.startswith("find-ticket-resnet50-imagenet-")
    net = package.load(run)
    assert sum(p.numel() for p in net.parameters()) == result["params"]["ticket"] < result["params"]["dense"]
    assert prunectl("show", run).code == 0
    died = forked(*_command(photos, tmp_path / "cut"), log=tmp_path / "log", die_at_write=16)  # after the draw
    assert died.code == 137, died.out
    resumed = prunectl(*_command(photos, tmp_path / "cut", "--resume"))
    assert resumed.code == 0 and "resumed" in resumed.out
    assert comparable(only_run(tmp_path / "cut")) == comparable(run)


def test_the_shipped_recipe_is_found_and_the_environment_names_the_folder(photos, monkeypatch):
    monkeypatch.setenv("PRUNECTL_DATA", str(photos))
    sets = [part for s in SMALL for part in ("--set", s)]
    document = prunectl("find-ticket", "resnet50", "imagenet", *sets, "--dry-run", "--json").document
    assert document["dataset"] == "imagenet" and document["training_flops"]["dense"] > 0
    printed = prunectl("find-ticket", "resnet50", "imagenet", "--print-recipe").out
    assert "epochs: 90" in printed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_photo_is_named(photos, tmp_path, workers):
    root = _tree(tmp_path / "data", per_class=4)
    broken = root / "imagenet" / "train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:-400])
    argv = [a for a in _command(root, tmp_path / "runs") if a not in ("--workers", 0)]
    failed = prunectl(*argv, "--workers", workers)
    assert failed.code == 6 and str(broken) in failed.err and failed.err.count("\n") == 1 and "Traceback" not in failed.err, failed


def test_a_class_folder_of_val_that_train_lacks(tmp_path):
    root = _tree(tmp_path / "data", per_class=2)
    (root / "imagenet" / "train" / WNIDS[2]).rename(tmp_path / "elsewhere")
    prunectl(*_command(root, tmp_path / "runs")).refused(6, WNIDS[2])
    assert run_folders(tmp_path / "runs") == []


def test_a_folder_given_instead_of_a_name(photos, tmp_path):
    sets = [part for s in (*SMALL, "train.lr=0.01") for part in ("--set", s)]
    argv = ("train", "resnet50", photos / "imagenet", "--epochs", 1, *sets[:8], "--workers", 0, "--out", tmp_path, "--json")
    document = prunectl(*argv).document
    assert document["outcome"] == "trained" and document["run"].split("/")[-1].startswith("train-resnet50-imagenet-")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_at_224_pixels_and_full_width(photos, tmp_path):
    sets = ("train.batch_size=6", "data.val_fraction=0.2", "ticket.probe_images=4", "ticket.probes_per_epoch=1", "train.lr=0.01")
    flags = [part for s in sets for part in ("--set", s)]
    argv = ("find-ticket", "resnet50", "imagenet", "--data-dir", photos, "--epochs", 2, "--detector", "epoch:1", *flags)
    document = prunectl(*argv, "--out", tmp_path, "--json").document
    assert document["macs"]["dense"] > 4.0e9 and document["outcome"] == "found"
    assert sum(p.numel() for p in package.load(only_run(tmp_path)).parameters()) == document["params"]["ticket"]
