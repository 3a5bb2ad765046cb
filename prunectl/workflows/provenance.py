"""What a number came from, besides `versions`: the hardware and the commit that a run records beside its results."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from prunectl import dist
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
    head = Path(__file__).parents[2] / ".git" / "HEAD"
    try:
        text = head.read_text(encoding="utf-8").strip()
        return (head.parent / text[5:]).read_text(encoding="utf-8").strip() if text.startswith("ref: ") else text
    except OSError:
        return None
