"""Everything that can be named, read from its source so that lists and completion come at once."""

from __future__ import annotations

from collections.abc import Callable

KINDS = {
    "models": "network",
    "datasets": "data set",
    "criteria": "criterion",
    "detectors": "detector",
    "constraints": "constraint",
    "devices": "device",
    "profiles": "export profile",
    "recipes": "recipe",
}
_MODULES = {
    "criteria": "pruning/criteria.py",
    "detectors": "pruning/detectors.py",
    "constraints": "pruning/constraints.py",
    "devices": "bench/devices.py",
    "profiles": "export/profiles.py",
}


def entries(kind: str) -> dict[str, str]:
    """Names of one of KINDS and what each is."""
    if kind == "recipes":
        from prunectl.shipped import known_recipes

        return known_recipes()
    if kind in _MODULES:
        from prunectl.registry import Registry

        return Registry(KINDS[kind], _MODULES[kind]).help()
    if kind == "models":
        from prunectl.models import models

        return models.help()
    from prunectl.data import datasets

    return datasets.help()


def completion(kind: str) -> Callable[[str], list[str]]:
    """What TAB offers in a shell that `--install-completion` has prepared."""
    return lambda incomplete: [name for name in entries(kind) if name.startswith(incomplete)]
