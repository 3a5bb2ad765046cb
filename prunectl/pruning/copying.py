"""A copy of a network, also of one that keeps activations from its last pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy with the same modes. Activations that `model` keeps in attributes (also in lists, tuples and dicts) are copied
    without their graph, which copy.deepcopy refuses to do.

    Raises RuntimeError for a convolution or linear layer whose weight is computed from others (torch.nn.utils.weight_norm)."""
    memo: dict[int, object] = {}
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            for kept in _tensors(vars(module).values()):
                if not kept.is_leaf:
                    memo[id(kept)] = kept.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _tensors(value.values() if isinstance(value, dict) else value)
