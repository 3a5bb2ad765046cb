"""Checkpoints that a crash cannot spoil: one safetensors file and one JSON file an epoch, the two newest kept.

The JSON is written last and holds the sha256 of the tensors and one of its own content, so a checkpoint without it, or
one that does not match, is passed over for the one before. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from prunectl.errors import CorruptFile
from prunectl.files import atomic, sha256, write_json

KEEP = 2
PICKLES = (b"PK", b"\x80")  # torch's zip, and every pickle since protocol 2


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by "<section>/<name>" and whatever JSON went with them."""

    epoch: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}/"): t for k, t in self.tensors.items() if k.startswith(f"{name}/")}


def save(folder: Path, epoch: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of `epoch` and removes all but the two newest."""
    path = folder / f"epoch-{epoch:05d}.safetensors"
    write_tensors(path, tensors)
    content = json.loads(json.dumps({"epoch": epoch, "sha256": sha256(path), "meta": dict(meta)}))
    write_json(path.with_suffix(".json"), {**content, "seal": _seal(content)})
    for old in sorted(folder.glob("epoch-*.json"))[:-KEEP]:
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.unlink()
    return path


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None, and a sentence for each one passed over."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("epoch-*.safetensors"), reverse=True):
        try:
            return _read(path), passed_over
        except CorruptFile as e:
            passed_over.append(str(e))
    return None, passed_over


def discard(folder: Path) -> None:
    """Removes every checkpoint: of a training that begins anew, whose own would be older than they are."""
    for path in folder.glob("epoch-*"):
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. Raises OSError, as on a full disk, which the library's own writing to a file would disguise."""
    with atomic(path) as temporary:
        temporary.write_bytes(serialised(_apart(tensors)))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, one copy for every name: the format has no word for tied weights or other shared memory."""
    taken: set[int] = set()
    apart = {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        apart[name] = t.clone() if place in taken else t
        taken.add(place)
    return apart


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CorruptFile; a pickle is told apart by its first bytes and not opened.

    Those bytes decide only what is said: a safetensors file begins with a length that may look like them."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        if path.is_file() and path.open("rb").read(2).startswith(PICKLES):
            raise CorruptFile(
                f"{path} is a pickle (a .pt file): it could run code when opened, so prunectl reads safetensors only"
            ) from None
        raise CorruptFile(f"{path} is no whole safetensors file ({e})") from None


def _read(path: Path) -> Checkpoint:
    try:
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        seal, content = info["seal"], {key: info[key] for key in ("epoch", "sha256", "meta")}
    except FileNotFoundError:
        raise CorruptFile(f"checkpoint {path.name} was not finished") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptFile(f"checkpoint {path.with_suffix('.json').name} is damaged") from None
    if _seal(content) != seal:
        raise CorruptFile(f"checkpoint {path.with_suffix('.json').name} is damaged: its content is not what was written")
    if sha256(path) != content["sha256"]:
        raise CorruptFile(f"checkpoint {path.name} is damaged: its sha256 is not the one written down")
    return Checkpoint(content["epoch"], read_tensors(path), content["meta"])


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
