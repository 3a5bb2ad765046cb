"""Folders of image files: layouts, the photo pipeline, worker processes, and what is said about bad files."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from true_formats import pixels, save, write_imagenet, write_tiny_imagenet

from prunectl.data import describe, load
from prunectl.data.dataset import Request
from prunectl.data.images import normalised
from prunectl.data.workers import WorkerStream, default_workers
from prunectl.errors import DataMissing, UnknownName, UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "imagenet"
    write_imagenet(root)
    return root


@pytest.fixture
def own_root(tmp_path):
    """A copy to damage."""
    write_imagenet(tmp_path / "imagenet", per_class=4)
    return tmp_path / "imagenet"


def collect(batches) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


# ImageNet's layout


@pytest.mark.parametrize("inside", ["", ".."])
def test_imagenet_is_read_from_its_folder_or_the_one_above(root, inside):
    ds = load("imagenet", data_dir=root / inside, image_size=32, workers=0, val_fraction=0.25)
    assert ds.info.classes == ("n01440764", "n01441764", "n01442764")
    assert (ds.info.n_train, ds.info.n_val, ds.info.n_test) == (18, 6, 9)
    assert (ds.info.mean, ds.info.fit, ds.info.augment) == ((0.485, 0.456, 0.406), "resize-crop", "imagenet")
    x, y = collect(ds.eval_batches("test", batch_size=4))
    assert x.shape == (9, 3, 32, 32) and y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_describe_asks_for_photos_at_224(root):
    summary = describe("imagenet", data_dir=root)
    assert (summary.image_size, summary.channels, summary.photos, len(summary.classes)) == (224, 3, True, 3)


def test_evaluation_equals_torchvisions_pipeline(root):
    ds = load("imagenet", data_dir=root, image_size=56, workers=0)
    x, _ = collect(ds.eval_batches("test", batch_size=4))
    transform = v2.Compose([v2.Resize(64, antialias=True), v2.CenterCrop(56), v2.PILToTensor()])
    for got, path in zip(x, sorted(root.glob("val/*/*.JPEG")), strict=True):
        raw = transform(Image.open(path).convert("RGB"))[None]
        assert torch.equal(got, normalised(raw, ds.info.mean, ds.info.std)[0])


def test_grey_and_cmyk_photos_become_rgb(root):
    for name, mode in (("n01440764/n01440764_1.JPEG", "L"), ("n01441764/n01441764_2.JPEG", "CMYK")):
        assert Image.open(root / "train" / name).mode == mode
    ds = load("imagenet", data_dir=root, image_size=32, workers=0)
    x, _ = collect([*ds.eval_batches("train", batch_size=8), *ds.eval_batches("val", batch_size=8)])
    raw = x * torch.tensor(ds.info.std).view(-1, 1, 1) + torch.tensor(ds.info.mean).view(-1, 1, 1)
    grey = (raw[:, 0] - raw[:, 1]).abs().amax((1, 2)) < 1e-5  # equal channels, up to float32 rounding
    assert x.shape[1] == 3 and grey.sum() == 1


@pytest.mark.parametrize("policy", ["imagenet", "crop-flip"])
def test_batches_do_not_depend_on_the_number_of_workers(root, policy):
    reference = None
    for workers in (0, 1, 2):
        ds = load("imagenet", data_dir=root, image_size=32, workers=workers, augment=policy)
        got = [collect(ds.train_batches(epoch, batch_size=4, seed=5)) for epoch in (1, 2)]
        got.append(collect(ds.eval_batches("val", batch_size=2)))
        got.append(ds.sample(10, seed=1))
        reference = reference or got
        for (x, y), (rx, ry) in zip(got, reference, strict=True):
            assert torch.equal(x, rx) and torch.equal(y, ry)
    assert not torch.equal(reference[0][0], reference[1][0])


def test_an_image_is_augmented_alike_on_any_rank(root):
    """Each image's window hangs on (seed, epoch, image), so shards put together are the whole epoch."""
    ds = load("imagenet", data_dir=root, image_size=32, workers=0)
    whole, _ = collect(ds.train_batches(3, batch_size=21, seed=5))
    parts = [collect(ds.train_batches(3, batch_size=7, seed=5, rank=rank, world=3))[0] for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_worker_streams_may_overlap_be_left_and_start_again(root):
    ds = load("imagenet", data_dir=root, image_size=32, workers=1)
    whole, _ = collect(ds.train_batches(1, batch_size=4, seed=0))
    train = ds.train_batches(1, batch_size=4, seed=0)
    first = next(train)[0]
    probe, _ = collect(ds.eval_batches("val", batch_size=2))  # in the middle of the epoch
    assert torch.equal(torch.cat([first, *[x for x, _ in train]]), whole)
    left = ds.train_batches(2, batch_size=4, seed=0)
    next(left)
    left.close()
    assert torch.equal(collect(ds.eval_batches("val", batch_size=2))[0], probe)


def test_global_random_state_is_left_alone(root):
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ds = load("imagenet", data_dir=root, image_size=32, workers=1)
    collect(ds.train_batches(1, batch_size=4, seed=0))
    ds.sample(4, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["imagenet", "none"])
def test_a_truncated_photo_is_named_in_one_sentence(own_root, workers, policy):
    bad = own_root / "train" / "n01440764" / "n01440764_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:400])
    ds = load("imagenet", data_dir=own_root, image_size=32, workers=workers, augment=policy)
    with pytest.raises(DataMissing) as caught:
        collect([*ds.train_batches(1, batch_size=3, seed=0), *ds.eval_batches("val", batch_size=3)])
    message = str(caught.value)
    assert str(bad) in message and "\n" not in message and "Traceback" not in message and "worker" not in message


def test_a_stream_that_failed_can_be_followed_by_another(own_root):
    for k in (0, 1):  # one image of a class is validation, so at least one of these is not
        bad = own_root / "train" / "n01440764" / f"n01440764_{k}.JPEG"
        bad.write_bytes(bad.read_bytes()[:400])
    ds = load("imagenet", data_dir=own_root, image_size=32, workers=2, augment="none")
    whole = collect(ds.eval_batches("test", batch_size=1))[0]
    with pytest.raises(DataMissing):
        list(ds.train_batches(1, batch_size=3, seed=0))
    assert torch.equal(collect(ds.eval_batches("test", batch_size=1))[0], whole)
    assert len(multiprocessing.active_children()) == 2


def test_workers_end_with_their_data_set_even_in_a_cycle_of_garbage(root):
    gc.collect()
    before = set(multiprocessing.active_children())
    ds = load("imagenet", data_dir=root, image_size=32, workers=2)
    next(ds.eval_batches("test", batch_size=1))
    cycle = [ds]
    cycle.append(cycle)
    started = time.monotonic()
    del ds, cycle
    gc.collect()
    assert set(multiprocessing.active_children()) <= before
    assert time.monotonic() - started < 4  # torch waits five seconds for a worker that it cannot reach


@pytest.mark.parametrize("content", [b"", b"no image", "16 bit", "gone"])
def test_other_bad_files_are_named(own_root, content):
    bad = own_root / "val" / "n01440764" / "ILSVRC2012_val_00.JPEG"
    if content == "16 bit":
        Image.fromarray(np.zeros((60, 60), np.uint16)).save(bad, format="PNG")
    elif content != "gone":
        bad.write_bytes(content)
    ds = load("imagenet", data_dir=own_root, image_size=32, workers=0)
    if content == "gone":
        bad.unlink()
    with pytest.raises(DataMissing) as caught:
        list(ds.eval_batches("test", batch_size=3))
    message = str(caught.value)
    assert message.count(str(bad)) == 1 and "\n" not in message
    assert {"16 bit": "8 bits", "gone": "is missing"}.get(content, "not a readable image") in message


class Deadly:
    """A view whose pixels cost a worker its life, as running out of memory does."""

    def __getitem__(self, request):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_in_a_sentence():
    batches = WorkerStream(Deadly(), 2)([Request(np.arange(1), None)] * 4)
    with pytest.raises(UsageError, match="shm-size"):
        next(batches)


def test_a_flat_val_folder_is_explained(own_root):
    for photo in own_root.glob("val/*/*"):
        photo.rename(own_root / "val" / photo.name)
    for folder in own_root.glob("val/n*"):
        folder.rmdir()
    with pytest.raises(DataMissing, match=r"flat folder.*valprep\.sh"):
        load("imagenet", data_dir=own_root)


def test_archives_not_yet_unpacked_are_explained(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "n01440764.tar").write_bytes(b"")
    with pytest.raises(DataMissing, match="unpack each"):
        load("imagenet", data_dir=tmp_path)


# Tiny ImageNet


@pytest.mark.parametrize("inside", ["tiny-imagenet", "tiny-imagenet-200", ""])
def test_tiny_imagenet_takes_test_labels_from_the_table(tmp_path, inside):
    write_tiny_imagenet(tmp_path / inside)
    ds = load("tiny_imagenet", data_dir=tmp_path)
    assert (ds.info.n_train, ds.info.n_val, ds.info.n_test, ds.info.image_size, ds.info.fit) == (21, 3, 7, 64, "none")
    x, y = collect(ds.eval_batches("test", batch_size=3))
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for k in range(7):
        raw = np.array(Image.open(tmp_path / inside / "val" / "images" / f"val_{k}.JPEG")).transpose(2, 0, 1)
        assert torch.equal(x[k], normalised(torch.from_numpy(raw)[None], ds.info.mean, ds.info.std)[0])


def test_tiny_imagenet_with_sorted_val_is_read(tmp_path):
    write_tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    for k in range(7):
        old = tmp_path / "val" / "images" / f"val_{k}.JPEG"
        new = tmp_path / "val" / f"n0144{k % 3}764" / old.name
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
    (tmp_path / "val" / "images").rmdir()
    assert load("tiny-imagenet", data_dir=tmp_path).info.n_test == 7


def test_tiny_imagenets_bad_files_are_named(tmp_path):
    write_tiny_imagenet(tmp_path)
    (tmp_path / "val" / "images" / "val_4.JPEG").unlink()
    with pytest.raises(DataMissing, match=r"val_4\.JPEG is named in val_annotations\.txt and missing"):
        load("tiny-imagenet", data_dir=tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(DataMissing, match=r"val_0\.JPEG: its class 'n99' is not among the 3"):
        load("tiny-imagenet", data_dir=tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    with pytest.raises(DataMissing, match="val_annotations"):
        load("tiny-imagenet", data_dir=tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(DataMissing, match="is empty"):
        load("tiny-imagenet", data_dir=tmp_path)


# Any folder


def write_folder(root: Path, splits: dict[str, int], *, size=(40, 30), suffix=".png", classes=("cat", "dog")) -> None:
    for split, n in splits.items():
        for c, name in enumerate(classes):
            for k in range(n):
                save(root / split / name / "deeper" / f"{k}{suffix}", size, seed=hash((len(split), c, k)) % 10**6)


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": 10, "val": 4}, (18, 2, 8)),
        ({"train": 10, "valid": 4}, (18, 2, 8)),
        ({"train": 10, "test": 3}, (18, 2, 6)),
        ({"train": 10, "val": 4, "test": 3}, (20, 8, 6)),
    ],
)
def test_a_folders_splits_become_train_val_and_test(tmp_path, splits, sizes):
    write_folder(tmp_path / "pets", splits)
    ds = load(str(tmp_path / "pets"), image_size=16, workers=0)
    assert (ds.info.n_train, ds.info.n_val, ds.info.n_test) == sizes
    assert (ds.info.name, ds.info.classes, ds.info.fit, ds.info.channels) == ("pets", ("cat", "dog"), "resize-crop", 3)


def test_a_share_for_validation_where_there_is_a_folder_for_it_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 10, "val": 4, "test": 3})
    with pytest.raises(UsageError, match=r"val_fraction = 0.4.*leave it out"):
        load(str(tmp_path), image_size=16, workers=0, val_fraction=0.4)


@pytest.mark.parametrize("held", [True, False])
def test_a_fingerprint_is_of_the_images(tmp_path, monkeypatch, held):
    if not held:
        monkeypatch.setattr("prunectl.data.folders.MEMORY_BYTES", 1000)
    write_folder(tmp_path, {"train": 10, "val": 4}, size=(32, 32))
    first = load(str(tmp_path)).fingerprint()
    assert load(str(tmp_path), train_images=5, workers=0).fingerprint() == first
    (gone,) = (tmp_path / "train" / "cat").rglob("3.png")
    gone.unlink()
    assert load(str(tmp_path), workers=0).fingerprint() != first


def test_an_unlabelled_test_folder_is_not_the_test(tmp_path):
    write_folder(tmp_path, {"train": 10, "val": 4})
    save(tmp_path / "test" / "unlabelled.png", (40, 30), seed=1)
    assert load(str(tmp_path), image_size=16, workers=0).info.n_test == 8


def test_a_folder_below_the_data_dir_is_found(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", {"train": 3, "val": 1})
    monkeypatch.setenv("PRUNECTL_DATA", str(tmp_path))
    assert describe("pets").classes == ("cat", "dog")


def test_statistics_of_a_folder_are_those_of_its_training_images(tmp_path):
    write_folder(tmp_path, {"train": 12, "val": 2})
    ds = load(str(tmp_path), image_size=16, workers=0)
    x, _ = collect(ds.eval_batches("train", batch_size=8))
    assert x.mean((0, 2, 3)).abs().max() < 1e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 2e-3  # four decimals of both
    assert ds.info == load(str(tmp_path), image_size=16, workers=2).info


def test_small_square_images_are_data_and_not_photos(tmp_path):
    write_folder(tmp_path, {"train": 10, "val": 4}, size=(32, 32))
    assert describe(str(tmp_path)).image_size == 32 and not describe(str(tmp_path)).photos
    ds = load(str(tmp_path))
    assert (ds.info.image_size, ds.info.fit, ds.info.augment) == (32, "none", "crop-flip")
    x, _ = next(ds.eval_batches("test", batch_size=1))
    raw = np.array(Image.open(tmp_path / "val" / "cat" / "deeper" / "0.png")).transpose(2, 0, 1)
    assert torch.equal(x, normalised(torch.from_numpy(raw)[None], ds.info.mean, ds.info.std))
    assert load(str(tmp_path), image_size=40).info.fit == "pad"
    with pytest.raises(UsageError, match="crop-flip"):
        load(str(tmp_path), augment="imagenet")


def test_small_images_that_exceed_memory_stay_files_with_the_same_pixels(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 10, "val": 4}, size=(32, 32))
    held = load(str(tmp_path))
    monkeypatch.setattr("prunectl.data.folders.MEMORY_BYTES", 1000)
    files = load(str(tmp_path), workers=1)
    assert files.info == held.info
    for a, b in zip(held.train_batches(1, batch_size=6, seed=0), files.train_batches(1, batch_size=6, seed=0), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    "build", ["nothing", "flat train", "no val", "empty class", "strange class", "lacking class", "one class", "a file"]
)
def test_other_layouts_are_data_missing(tmp_path, build):
    root = tmp_path / "set"
    root.mkdir()
    if build == "flat train":
        save(root / "train" / "a.png", (8, 8), seed=0)
        write_folder(root, {"val": 1})
    elif build == "no val":
        write_folder(root, {"train": 2})
    elif build == "empty class":
        write_folder(root, {"train": 2, "val": 1})
        (root / "train" / "bird").mkdir()
    elif build == "strange class":
        write_folder(root, {"train": 2, "val": 1})
        save(root / "val" / "bird" / "0.png", (8, 8), seed=0)
    elif build == "lacking class":
        write_folder(root, {"train": 2, "val": 1})
        save(root / "train" / "bird" / "0.png", (8, 8), seed=0)
    elif build == "one class":
        for split in ("train", "val"):
            save(root / split / "images" / "0.png", (8, 8), seed=0)
    elif build == "a file":
        root = root / "x.txt"
        root.write_text("")
    with pytest.raises(DataMissing) as caught:
        load(str(root), image_size=16, workers=0)
    message = str(caught.value)
    assert str(root) in message and "\n" not in message
    says = {
        "nothing": "no folder train",
        "one class": "one class folder, 'images'",
        "flat train": "no class folders",
        "no val": "no labelled images",
        "empty class": "bird holds no images",
        "strange class": "'bird' is not among the 2",
        "lacking class": "val has no images of class 'bird'",
        "a file": "is a file",
    }
    assert says[build] in message


def test_names_and_paths_that_are_neither():
    with pytest.raises(UnknownName, match="did you mean cifar10"):
        load("cifar-10")
    with pytest.raises(UnknownName, match="did you mean fashion-mini"):
        describe("fashion_mni")
    for path in ("./nowhere", "/no/where", "~/no-such-folder-here"):
        with pytest.raises(DataMissing, match="does not exist"):
            load(path)


def test_default_workers_are_shared_between_the_processes_of_a_job(monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    assert default_workers() == min(cpus, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cpus * 4))
    assert default_workers() == 1


def test_names_that_are_not_ascii_are_read(tmp_path):
    write_folder(tmp_path, {"train": 3, "val": 1}, classes=("Katze", "größer"))
    ds = load(str(tmp_path), image_size=16, workers=0)
    assert ds.info.classes == ("Katze", "größer") and len(collect(ds.eval_batches("test", batch_size=4))[1]) == 2


def test_pixels_helper_is_noise():
    assert len(np.unique(pixels(1, 64, 64))) > 200
