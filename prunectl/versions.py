"""Versions of what a number depends on; every result carries them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from prunectl import __version__


def versions() -> dict[str, str]:
    found = {"prunectl": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "torch-pruning", "numpy", "onnx", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
