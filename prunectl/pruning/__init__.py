"""The core: pure tensor maths on modules and plain numbers. No recipes, no files, no printing, no globals.

`from prunectl.pruning import SFW, KSparse, activation_code, ...` reaches the pieces a library user needs; each is
imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "SFW": "sfw",
    "KSparse": "constraints",
    "KSupport": "constraints",
    "GroupKSupport": "constraints",
    "NM": "constraints",
    "LpBall": "constraints",
    "Unconstrained": "constraints",
    "frank_wolfe_step": "sfw",
    "frank_wolfe_gap": "sfw",
    "sets_for": "constraints",
    "sfw_init_": "sfw_init",
    "prune_global_": "oneshot",
    "prune_layerwise_": "oneshot",
    "prune_nm_": "oneshot",
    "small_filters": "oneshot",
    "reconstruct_": "reconstruct",
    "recalibrate_": "recalibrate",
    "activation_code": "spline",
    "code_distance": "spline",
    "spline_scores": "spline",
    "removal_errors": "surgeon",
    "covariances": "moments",
    "analyse": "surgery",
    "compact": "surgery",
    "replay": "surgery",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prunectl.pruning' has no attribute '{name}'")
    return getattr(importlib.import_module(f"prunectl.pruning.{_EXPORTS[name]}"), name)
