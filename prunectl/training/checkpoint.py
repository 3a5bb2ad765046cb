"""Checkpoints that a crash cannot spoil: one safetensors file and one JSON file an epoch, the two newest kept.

The JSON is written last and holds the sha256 of the tensors, so a checkpoint without it, or one that does not match, is
passed over for the one before. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunectl.errors import CorruptFile
from prunectl.files import atomic, sha256, write_json

KEEP = 2


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
    write_json(path.with_suffix(".json"), {"epoch": epoch, "sha256": sha256(path), "meta": dict(meta)})
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
            passed_over.append(f"{e}; taking the one before it")
    return None, passed_over


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CorruptFile, also for a pickle, which is refused unread."""
    try:
        with path.open("rb") as f:
            head = f.read(4)
        if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise CorruptFile(f"{path} is a pickle (a .pt file): it could run code when opened, so prunectl reads safetensors only")
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CorruptFile(f"{path} is no whole safetensors file ({e})") from None


def _read(path: Path) -> Checkpoint:
    try:
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        expected, epoch, meta = info["sha256"], int(info["epoch"]), info["meta"]
    except FileNotFoundError:
        raise CorruptFile(f"checkpoint {path.name} was not finished") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptFile(f"checkpoint {path.with_suffix('.json').name} is damaged") from None
    if sha256(path) != expected:
        raise CorruptFile(f"checkpoint {path.name} is damaged: its sha256 is not the one written down")
    return Checkpoint(epoch, read_tensors(path), meta)
