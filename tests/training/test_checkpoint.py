"""Checkpoints against every way a file can be spoilt."""

from __future__ import annotations

import errno
import json
import pickle
import random
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialised
from torch import Tensor

from prunectl.errors import CorruptFile
from prunectl.training import checkpoint


def _tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model/a": torch.randn(3, 4, generator=g),
        "model/n": torch.tensor(seed),
        "optimizer/a/momentum": torch.randn(3, 4, generator=g),
    }


def _three(folder: Path) -> None:
    for epoch in range(3):
        checkpoint.save(folder, epoch, _tensors(epoch), {"spent": epoch})


def test_what_comes_back_is_what_was_saved_and_two_are_kept(tmp_path):
    _three(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"epoch-0000{e}.{kind}" for e in (1, 2) for kind in ("json", "safetensors")]
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is not None and (found.epoch, found.meta, passed_over) == (2, {"spent": 2}, [])
    assert all(torch.equal(t, found.tensors[k]) and t.dtype == found.tensors[k].dtype for k, t in _tensors(2).items())
    assert found.section("model").keys() == {"a", "n"} and found.section("optimizer").keys() == {"a/momentum"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # more than the newline that JSON can do without


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


def _garbage(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("spoil", [_truncate, _empty, _flip, _garbage, Path.unlink])
@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_spoilt_checkpoint_is_passed_over_for_the_one_before(tmp_path, spoil, kind):
    _three(tmp_path)
    spoil(tmp_path / f"epoch-00002.{kind}")
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is not None and found.epoch == 1 and torch.equal(found.tensors["model/a"], _tensors(1)["model/a"])
    gone = kind == "safetensors" and spoil is Path.unlink  # nothing to pass over: its JSON alone is no checkpoint
    assert gone or (len(passed_over) == 1 and "epoch-00002" in passed_over[0])


def test_every_flipped_bit_of_the_json_is_noticed_or_harmless(tmp_path):
    """One bit in each byte of the JSON: the epoch, the sha256 and the meta it is read for must not come back changed."""
    checkpoint.save(tmp_path, 7, _tensors(7), {"spent": 123})
    path = tmp_path / "epoch-00007.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        found, _ = checkpoint.newest(tmp_path)
        assert found is None or (found.epoch, found.meta) == (7, {"spent": 123}), (i, path.read_bytes())


def test_when_all_are_spoilt_there_is_none(tmp_path):
    _three(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        _truncate(path)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is None and len(passed_over) == 2
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


class _Touch:
    """An object whose pickle creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_not_opened(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(_Touch(tmp_path / "executed"), protocol))
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        checkpoint.read_tensors(path)
    assert not (tmp_path / "executed").exists()


def test_a_torch_file_is_refused_as_what_it_is(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(2), "bomb": _Touch(tmp_path / "executed")}, path)
    with pytest.raises(CorruptFile, match="pickle"):
        checkpoint.read_tensors(path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_a_checkpoints_place_is_passed_over_even_with_a_matching_sum(tmp_path):
    _three(tmp_path)
    path = tmp_path / "epoch-00002.safetensors"
    torch.save(_Touch(tmp_path / "executed"), path)
    info = json.loads(path.with_suffix(".json").read_text())
    content = {"epoch": 2, "sha256": checkpoint.sha256(path), "meta": info["meta"]}
    path.with_suffix(".json").write_text(json.dumps({**content, "seal": checkpoint._seal(content)}))
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is not None and found.epoch == 1 and "pickle" in passed_over[0]
    assert not (tmp_path / "executed").exists()


def _with_header_of(size: int) -> dict[str, Tensor]:
    """Tensors whose safetensors header is `size` bytes long: the file then begins with that number."""
    for length in range(size - 100, size):
        tensors = {"t" * length: torch.zeros(1)}
        if int.from_bytes(serialised(tensors)[:8], "little") == size:
            return tensors
    raise AssertionError(f"no tensors with a header of {size} bytes")


@pytest.mark.parametrize("size", [0x280, 0x480, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, size):
    """0x280 bytes of header begin with 80 02, as pickles of protocol 2 do, and 0x4b50 with the PK of a zip."""
    tensors = _with_header_of(size)
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    assert checkpoint.read_tensors(tmp_path / "t.safetensors").keys() == tensors.keys()


def test_writing_the_same_tensors_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        checkpoint.write_tensors(tmp_path / name, _tensors(0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_it_is(small_disk):
    checkpoint.save(small_disk, 0, _tensors(0), {})
    with pytest.raises(OSError) as failed:
        checkpoint.save(small_disk, 1, {"big": torch.zeros(100_000)}, {})
    assert failed.value.errno == errno.ENOSPC
    found, passed_over = checkpoint.newest(small_disk)
    assert found is not None and found.epoch == 0 and passed_over == []
    assert sorted(p.name for p in small_disk.iterdir()) == ["epoch-00000.json", "epoch-00000.safetensors"]


def test_tied_weights_and_views_are_saved_under_each_of_their_names(tmp_path):
    """The format refuses tensors that share memory; a network with tied weights has them, and so has a detector's thinned code."""
    whole = torch.arange(12.0)
    tensors = {"a": whole, "b": whole, "view": whole[4:8], "empty": whole[:0], "none": whole[:0]}
    checkpoint.save(tmp_path, 1, tensors, {})
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and all(torch.equal(t, found.tensors[k]) for k, t in tensors.items())
