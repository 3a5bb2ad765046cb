"""How a bench is to measure: a recipe, then the command line, over the defaults of the device.

A bench recipe has three keys: `device`, `profile` (of the files a board is given) and `bench`, a section of Settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunectl.bench import devices as device_room
from prunectl.bench.records import Settings
from prunectl.bench.ssh import checked_host
from prunectl.errors import UnknownName, UsageError
from prunectl.export.profiles import load as load_profile
from prunectl.recipe import merged
from prunectl.shipped import shipped

KEYS = ("device", "profile", "bench")


@dataclass(frozen=True)
class Plan:
    """device: its name. target: what stands behind the colon, or in --host. profile None: what suits the device."""

    device: str = "cpu"
    target: str | None = None
    profile: str | None = None
    settings: Settings = field(default_factory=Settings.for_host)


def plan(
    *,
    recipe: str | None = None,
    host: str | None = None,
    quick: bool = False,
    given: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> Plan:
    """recipe: a shipped one's name or a file. given: what else the command line says, `device` or `bench.repeats` -> value.

    Each goes over what stands before: the device's defaults, the recipe, --quick, the command line. Raises UsageError,
    DeviceUnavailable."""
    written, said = _checked(merged(_file(recipe), {})), _checked(merged(None, given or {}, sets))
    spec = said.get("device") or ("jetson" if host is not None else written.get("device") or "cpu")
    if not isinstance(spec, str):
        raise UsageError(f"device = {spec!r}: expected a name, e.g. cpu or jetson")
    device, target = device_room.parse(spec)
    if host is not None and (device != "jetson" or target is not None):
        raise UsageError(f"--host {host} and --device {spec}: --host is the board of --device jetson; give one of them")
    profile = said.get("profile") or written.get("profile")
    if profile is not None:
        load_profile(str(profile))
    settings = (Settings() if device == "jetson" else Settings.for_host()).but(written.get("bench", {}))
    settings = (settings.quick() if quick else settings).but(said.get("bench", {}))
    if device == "jetson":  # before minutes are spent on exporting for a board that nobody named
        board = device_room.jetson_host(target if host is None else host)
        target = None if board is None else checked_host(board)
    return Plan(device, target, profile, settings)


def _file(recipe: str | None) -> Path | None:
    """The file of a recipe: as given, or the shipped one of that name."""
    if recipe is None or Path(recipe).is_file():
        return Path(recipe) if recipe else None
    known = {path.stem: path for path in (shipped("recipes") / "bench").glob("*.yaml")}
    name = recipe.removeprefix("bench/")
    if name not in known:
        raise UnknownName("bench recipe", recipe, known, "A file of your own works too.")
    return known[name]


def _checked(tree: dict[str, Any]) -> dict[str, Any]:
    for key, value in tree.items():
        if key not in KEYS:
            raise UnknownName("key of a bench recipe", key, KEYS, "Settings stand below bench, as in bench.repeats.")
        if key == "bench" and not isinstance(value, dict):
            raise UsageError(f"bench = {value!r}: expected a section of settings, as in bench: {{repeats: 5}}")
    return tree
