"""Training and eval mode, set for a block and given back module by module, whatever happens inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restoring_modes(model: nn.Module) -> Iterator[None]:
    """Every module leaves the block in the mode in which it entered."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in eval mode inside the block."""
    with restoring_modes(model):
        model.eval()
        yield
