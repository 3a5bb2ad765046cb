"""The laws every registered data set obeys; a new one is tested as soon as its true format can be written here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from true_formats import write_cifar, write_imagenet, write_mnist, write_svhn, write_tiny_imagenet

from prunectl.data import DatasetInfo, datasets, describe, load
from prunectl.errors import DataMissing, UnknownName, UsageError

WRITERS = {
    "fashion-mini": lambda base: None,  # part of the package
    "fashion-mnist": lambda base: write_mnist(base),
    "mnist": lambda base: write_mnist(base),
    "cifar10": lambda base: write_cifar(base),
    "cifar100": lambda base: write_cifar(base, hundred=True),
    "svhn": lambda base: write_svhn(base),
    "tiny-imagenet": lambda base: write_tiny_imagenet(base),
    "imagenet": lambda base: write_imagenet(base),
}


@pytest.fixture(scope="module", params=sorted(WRITERS))
def case(request, tmp_path_factory):
    """(name, folder, data set), the data set small enough for a law to be checked on all of it."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    size = {"image_size": 32, "workers": 0} if request.param == "imagenet" else {}
    part = {"train_images": 101} if request.param == "fashion-mini" else {}
    return request.param, folder, load(request.param, data_dir=folder, **size, **part)


def identities(batches) -> list[bytes]:
    return [x.numpy().tobytes() for xs, _ in batches for x in xs]


def test_every_registered_set_is_tested_here():
    assert sorted(WRITERS) == datasets.names()
    assert all(datasets.get(name).__doc__.split("\n")[0] == line for name, line in datasets.help().items())


def test_shapes_classes_and_description(case):
    name, folder, ds = case
    info, summary = ds.info, describe(name, data_dir=folder)
    assert (summary.name, summary.classes, summary.channels) == (info.name, info.classes, info.channels) and info.name == name
    assert summary.photos or summary.image_size == info.image_size
    assert len(info.mean) == len(info.std) == info.channels and len(set(info.classes)) == len(info.classes)
    for split, n in (("train", info.n_train), ("val", info.n_val), ("test", info.n_test)):
        x, y = next(ds.eval_batches(split, batch_size=5))
        assert x.shape == (min(5, n), info.channels, info.image_size, info.image_size) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.dtype == torch.int64 and y.min() >= 0 and y.max() < len(info.classes)
    assert DatasetInfo.from_dict(info.to_dict()) == info


def test_splits_are_disjoint_and_counted(case):
    *_, ds = case
    for a, b in itertools.combinations(ds.splits.values(), 2):
        assert not set(a) & set(b)
    assert [len(ds.splits[s]) for s in ("train", "val", "test")] == [ds.info.n_train, ds.info.n_val, ds.info.n_test]
    assert min(ds.info.n_train, ds.info.n_val, ds.info.n_test) > 0


def test_the_split_ignores_the_runs_seed_and_its_size(case):
    name, folder, ds = case
    if name != "fashion-mini":
        small = load(name, data_dir=folder, train_images=ds.info.n_train // 2, workers=0)
        assert np.array_equal(small.splits["val"], ds.splits["val"]) and np.array_equal(small.splits["test"], ds.splits["test"])
        assert set(small.splits["train"]) < set(ds.splits["train"])


def test_an_epoch_is_a_function_of_seed_and_epoch(case):
    *_, ds = case
    torch.manual_seed(0)
    a = identities(ds.train_batches(1, batch_size=8, seed=3))
    torch.manual_seed(99)
    assert identities(ds.train_batches(1, batch_size=8, seed=3)) == a
    assert identities(ds.train_batches(2, batch_size=8, seed=3)) != a
    assert identities(ds.train_batches(1, batch_size=8, seed=4)) != a
    order = [torch.cat([y for _, y in ds.train_batches(e, batch_size=8, seed=3)]).tolist() for e in (1, 2)]
    assert order[0] != order[1]


@pytest.mark.parametrize("world", [2, 3])
def test_rank_shards_are_disjoint_and_of_equal_length(case, world):
    *_, ds = case
    plain = load_plain(case)
    shards = [identities(plain.train_batches(1, batch_size=4, seed=0, rank=r, world=world, drop_last=False)) for r in range(world)]
    assert {len(shard) for shard in shards} == {ds.info.n_train // world}
    assert len(set().union(*shards)) == sum(map(len, shards))


def test_eval_shards_are_disjoint_and_complete(case):
    *_, ds = case
    whole = identities(ds.eval_batches("test", batch_size=4))
    shards = [identities(ds.eval_batches("test", batch_size=4, rank=r, world=3)) for r in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(whole) and len(whole) == ds.info.n_test


def load_plain(case):
    name, folder, ds = case
    return load(name, data_dir=folder, augment="none", image_size=ds.info.image_size, workers=0,
                train_images=ds.info.n_train if name == "fashion-mini" else None)  # fmt: skip


def test_training_without_augmentation_shows_each_image_once_as_evaluation_does(case):
    plain, ds = load_plain(case), case[2]
    assert sorted(identities(plain.train_batches(1, batch_size=7, seed=0, drop_last=False))) == sorted(
        identities(ds.eval_batches("train", batch_size=9))
    )


def test_augmentation_changes_training_images_only(case):
    *_, ds = case
    assert ds.info.augment != "none"
    augmented = set(identities(ds.train_batches(1, batch_size=4, seed=0)))
    plain = set(identities(ds.eval_batches("train", batch_size=9)))
    assert len(augmented & plain) < len(augmented) / 2  # one shift in 81 and half of the mirrors change nothing


def test_evaluation_has_a_fixed_order(case):
    *_, ds = case
    assert identities(ds.eval_batches("val", batch_size=3)) == identities(ds.eval_batches("val", batch_size=5))


def test_the_last_batch_is_short_or_left_out(case):
    *_, ds = case
    n = ds.info.n_train
    size = next(k for k in range(2, n) if n % k)
    kept = [len(y) for _, y in ds.train_batches(1, batch_size=size, seed=0, drop_last=False)]
    dropped = [len(y) for _, y in ds.train_batches(1, batch_size=size, seed=0)]
    assert kept == [size] * (n // size) + [n % size] and dropped == [size] * (n // size)
    assert ds.train_steps(batch_size=size) == len(dropped) and ds.train_steps(batch_size=size, drop_last=False) == len(kept)


def test_a_limit_is_a_fixed_part(case):
    *_, ds = case
    some = identities(ds.eval_batches("test", batch_size=2, limit=5))
    assert some == identities(ds.eval_batches("test", batch_size=3, limit=5)) and len(some) == 5
    assert set(some) < set(identities(ds.eval_batches("test", batch_size=9)))
    assert len(identities(ds.eval_batches("test", batch_size=9, limit=10**6))) == ds.info.n_test


def test_a_sample_is_fixed_and_not_augmented(case):
    *_, ds = case
    (x, y), (again, _), (other, _) = ds.sample(9, seed=1), ds.sample(9, seed=1), ds.sample(9, seed=2)
    assert torch.equal(x, again) and not torch.equal(x, other) and len(x) == len(y) == 9
    assert {row.numpy().tobytes() for row in x} < set(identities(ds.eval_batches("train", batch_size=9)))
    assert len(ds.sample(10**6, seed=1, split="val")[0]) == ds.info.n_val


def test_a_batch_that_cannot_be_filled_is_refused(case):
    *_, ds = case
    with pytest.raises(UsageError, match=f"batch_size = {ds.info.n_train + 1}"):
        ds.train_batches(1, batch_size=ds.info.n_train + 1, seed=0)
    with pytest.raises(UsageError, match="for each of 2 processes"):
        ds.train_batches(1, batch_size=ds.info.n_train, seed=0, world=2)


def test_a_limit_is_spread_over_classes_of_a_sorted_set():
    ds = load("fashion-mini")
    _, y = next(ds.eval_batches("test", batch_size=200, limit=200))
    assert y.bincount(minlength=10).min() >= 8  # 20 expected; a sorted prefix of a folder would have one class


def test_limited_batches_mix_the_classes_of_a_folder(tmp_path):
    """A folder is listed class by class; statistics of single batches must not be those of one class."""
    for split, n in (("train", 12), ("val", 2)):
        for name in ("a", "b", "c", "d"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    ds = load(str(tmp_path), image_size=8, workers=0)
    for limit in (20, 10**6):
        for _, y in ds.eval_batches("train", batch_size=10, limit=limit):
            assert len(y) < 10 or len(y.unique()) > 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"fit": "padd"}, UnknownName, "did you mean pad"),
        ({"augment": "crop-flop"}, UnknownName, "did you mean crop-flip"),
        ({"augment": "imagenet"}, UsageError, "use crop-flip"),
        ({"image_size": 24}, UsageError, "fit='resize'"),
        ({"image_size": 0}, UsageError, "image_size = 0"),
        ({"val_fraction": 1.0}, UsageError, "val_fraction = 1.0"),
        ({"train_images": 9001}, UsageError, "9000 images"),
        ({"workers": -1}, UsageError, "workers = -1"),
    ],
)
def test_impossible_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        load("fashion-mini", **options)


def test_an_unknown_split_is_refused():
    with pytest.raises(UnknownName, match="did you mean test"):
        load("fashion-mini").eval_batches("tests", batch_size=8)


def test_files_without_images_are_refused(tmp_path):
    write_mnist(tmp_path, n_test=0)
    with pytest.raises(DataMissing, match="no test images"):
        load("mnist", data_dir=tmp_path)


def test_importing_the_registry_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; from prunectl.data import datasets; datasets.help(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"
