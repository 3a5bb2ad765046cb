"""What a number came from, besides `versions`: the hardware and the commit that a run records beside its results."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from prunectl import dist
from prunectl.files import sha256
from prunectl.models import userfile
from prunectl.recipe import Recipe
from prunectl.rundir import RunDir, read_json
from prunectl.training import compactmodel
from prunectl.training.precision import Placement


def hardware(placement: Placement) -> dict[str, Any]:
    cuda = torch.cuda.get_device_name(placement.device) if placement.device.type == "cuda" else None
    return {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "precision": placement.name,
        "channels_last": placement.channels_last,
        "ranks": dist.world_size(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def commit() -> str | None:
    """The checkout's commit, where the package is run from one."""
    git = Path(__file__).parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        ref = head.removeprefix("ref: ")
        if ref == head or (git / ref).is_file():
            return head if ref == head else (git / ref).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)
    except OSError:
        return None


def made_from(recipe: Recipe) -> dict[str, str]:
    """Files that a recipe only names and a run is made from, each with its sha256 as it is now: a user's network, the start's plan."""
    files = userfile.sources(recipe.model.name) if ":" in recipe.model.name else []
    if recipe.start:
        files.append(compactmodel.locate(Path(recipe.start)) / compactmodel.PLAN)
    return {str(f): sha256(f) for f in files}


def changed(run: RunDir) -> list[str]:
    """Those of the files that `run` was made from which are others by now."""
    recorded = read_json(run.info).get("made_from", {}) if run.info.is_file() else {}
    return [f for f, digest in recorded.items() if Path(f).is_file() and sha256(Path(f)) != digest]
