"""How many channels each group loses: one ratio for every layer, or one threshold over all of them.

Every group keeps at least max(8, a tenth) of its channels, and over several draws of those that it began with. Kept widths are
multiples of `round_to`, because engines pad odd widths: unrounded networks have run slower than what they were cut from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning.surgery import Graph

MIN_CHANNELS = 8
MIN_SHARE = 0.1


def floor_of(channels: int) -> int:
    """Channels a group of `channels` keeps at least."""
    return min(channels, max(MIN_CHANNELS, math.ceil(MIN_SHARE * channels)))


def prunable(graph: Graph, keep: str | None = None, *, began: Mapping[str, int] | None = None) -> dict[str, int]:
    """Group name -> channels, for groups that may shrink: unlocked, wider than their floor, no layer matching `keep`.

    keep: a regular expression searched in the names of the group's producers. began: group name -> channels before the first of
    several prunings, of groups that floors are to be reckoned from. Raises Unsatisfiable when none is left."""
    try:
        protected = re.compile(keep) if keep is not None else None
    except re.error as e:
        raise UsageError(f"--keep '{keep}' is no regular expression: {e}") from None
    if protected and not any(protected.search(p) for g in graph.groups for p in g.producers):
        named = ", ".join([p for g in graph.groups for p in g.producers][:3])
        raise UsageError(f"--keep '{keep}' matches no layer of this network; its layers are named like {named} (capital letters count).")
    floors = {g.name: floor_of((began or {}).get(g.name, g.channels)) for g in graph.groups}
    found = {
        g.name: g.channels
        for g in graph.groups
        if not g.locked and g.channels > floors[g.name] and not (protected and any(protected.search(p) for p in g.producers))
    }
    if not found:
        reasons = sorted({g.locked for g in graph.groups if g.locked})
        if least := [g for g in graph.groups if not g.locked and g.channels <= floors[g.name]]:
            reasons.insert(
                0, f"{least[0].name}{' and others have' if len(least) > 1 else ' has'} no more than the channels that always stay"
            )
        raise Unsatisfiable(
            "no layer of this network can lose channels"
            + (f" outside --keep '{keep}'" if keep is not None else "")
            + (f" ({'; '.join(reasons)})" if reasons else "")
        )
    return found


def layerwise(
    scores: Mapping[str, Tensor], *, sparsity: float, round_to: int = 8, floors: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Dropped channels when every group loses the share `sparsity` of its lowest scores. floors: by group, where not the usual."""
    least = floors or {name: floor_of(len(s)) for name, s in scores.items()}
    return {name: _lowest(s, len(s) - _width(len(s), len(s) * (1 - sparsity), round_to, least[name])) for name, s in scores.items()}


def globally(
    scores: Mapping[str, Tensor], *, sparsity: float, round_to: int = 8, floors: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Dropped channels when the share `sparsity` with the lowest scores of all groups goes, floors and rounding kept.

    The groups' scores are compared as they are given."""
    least = floors or {name: floor_of(len(s)) for name, s in scores.items()}
    pooled = torch.cat([s.double() for s in scores.values()])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
    quota = round(sparsity * len(pooled))
    room = [len(s) - least[name] for name, s in scores.items()]
    gone = [0] * len(room)
    for i in owner[pooled.argsort(stable=True)].tolist():
        if quota == 0:
            break
        if gone[i] < room[i]:
            gone[i] += 1
            quota -= 1
    return {
        name: _lowest(s, len(s) - _width(len(s), len(s) - n, round_to, least[name]))
        for (name, s), n in zip(scores.items(), gone, strict=True)
    }


def _width(channels: int, wanted: float, round_to: int, floor: int) -> int:
    """The allowed width nearest to `wanted`: a multiple of `round_to`, or all channels, and never below the floor."""
    rounded = max(math.ceil(floor / round_to) * round_to, math.floor(wanted / round_to + 0.5) * round_to)
    return min(channels, rounded)


def _lowest(scores: Tensor, n: int) -> list[int]:
    return sorted(scores.argsort(stable=True)[:n].tolist())
