"""What a model may be called, decided without importing torch.

A registered name wins; then come torchvision's classification names (bare or as `torchvision/NAME`), `timm/NAME`, and
`path/to/file.py:function`. `-` and `_` are equal except inside a file's path."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from prunectl.errors import UnknownName, UsageError
from prunectl.registry import Registry, canonical

models: Registry = Registry("model", "models/alexnet.py", "models/mobilenet.py", "models/preresnet.py", "models/resnet.py", "models/vgg.py")

Source = Literal["prunectl", "torchvision", "timm", "file"]


@dataclass(frozen=True)
class ModelName:
    """`name` as `source` spells it; str() is the one spelling that names the model everywhere."""

    source: Source
    name: str

    def __str__(self) -> str:
        return f"{self.source}/{self.name}" if self.source in ("torchvision", "timm") else self.name


def resolve(name: str) -> ModelName:
    """The model that `name` means. Raises UnknownName, or UsageError for a file without its function."""
    library, _, inside = name.partition("/")
    if ".py" in name:
        return _file(name)
    if library == "timm" and inside:
        return ModelName("timm", inside)
    if library == "torchvision" and inside:
        return _torchvision(inside)
    if name in models:
        return ModelName("prunectl", canonical(name))
    if canonical(name) in _torchvision_spellings():
        return _torchvision(name)
    known = {*models.names(), *_torchvision_spellings()}
    near = difflib.get_close_matches(canonical(name), known)
    raise UnknownName("model", name, known if near else models.names(), "torchvision/NAME, timm/NAME and file.py:function work too.")


def _file(name: str) -> ModelName:
    path, colon, function = name.rpartition(":")
    if not (colon and path.endswith(".py") and function.isidentifier()):
        raise UsageError(f"model '{name}': a model of your own is written path/to/file.py:function, as in nets.py:small_net")
    return ModelName("file", name)


def _torchvision(name: str) -> ModelName:
    spellings = _torchvision_spellings()
    if canonical(name) not in spellings:
        raise UnknownName("torchvision classification model", name, spellings)
    return ModelName("torchvision", spellings[canonical(name)])


def _torchvision_spellings() -> dict[str, str]:
    return {canonical(name): name for name in torchvision_names()}


@cache
def torchvision_names() -> list[str]:
    """The installed torchvision's classification models, read from its source text (importing it takes seconds)."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return []
    sources = (Path(package.origin).parent / "models").glob("*.py")
    found = (re.findall(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", path.read_text(encoding="utf-8"), re.M) for path in sources)
    return sorted(name for names in found for name in names)
