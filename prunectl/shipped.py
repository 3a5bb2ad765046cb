"""Data that travels with the package, found in a checkout or in an installed wheel; imports nothing that is slow."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """Data that comes with the package: `recipes` or `deploy`, in a checkout or in an installed wheel."""
    packed = PACKAGE / "_shipped" / folder
    return packed if packed.is_dir() else PACKAGE.parent / folder


def known_recipes() -> dict[str, str]:
    """Shipped recipes by name, with the first comment line of each."""
    root = shipped("recipes")
    found = {}
    for path in sorted(root.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[str(path.relative_to(root).with_suffix(""))] = first.lstrip("# ").strip()
    return found
