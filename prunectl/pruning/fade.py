"""Weights that pruning would remove, shrunk a little every few steps, so that removing them for good costs little.

Weight decay pulls at all weights; here only the entries below a pruning threshold shrink, and which threshold rotates through
the ratios that the network will be pruned to, so that it becomes prunable to all of them. Kin of growing regularization (Wang
et al., ICLR 2021), which aims at one ratio. Every constraint set here is a ball of a norm that depends on magnitudes and falls
with each of them, so that a feasible point stays one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from prunectl.pruning.oneshot import Masks, global_masks, layerwise_masks, nm_masks

Target = Callable[[Mapping[str, Tensor]], Masks]
HARDEST = 0.16  # share taken at once, the most that was ever tried: more of it makes short schedules diverge


def targets(ratios: Sequence[float], *, layerwise: bool = False, pattern: tuple[int, int] | None = None) -> list[Target]:
    """What decides in turn which entries stay: each ratio, and N:M where `pattern` is given."""
    masks = layerwise_masks if layerwise else global_masks
    by_ratio: list[Target] = [partial(masks, sparsity=ratio) for ratio in ratios]
    return [*by_ratio, partial(nm_masks, n=pattern[0], m=pattern[1])] if pattern else by_ratio


@torch.no_grad()
def fade_(weights: Mapping[str, Tensor], masks: Masks, share: float) -> None:
    """Takes the share `share`, at most HARDEST, off every entry that its mask would remove; a tensor without a mask stays."""
    for name, keep in masks.items():
        w = weights[name]
        w.mul_(torch.where(keep, 1.0, 1.0 - min(share, HARDEST)).to(w.dtype))
