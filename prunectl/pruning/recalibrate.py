"""Batch-norm statistics estimated anew after channels or weights were removed. Not retraining: no weight is learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def recalibrate_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replaces the running statistics of every batch norm by their cumulative mean over `batches` of inputs.

    The statistics become those of the pruned network on training images, without augmentation. All other modules stay
    in eval mode (dropout off). Returns the number of images seen; with no batch norm nothing runs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative mean
        m.train()
    seen = 0
    with torch.no_grad():
        for x in batches:
            model(x)
            seen += len(x)
    for m in norms:
        m.momentum = momenta[m]
    for module, training in modes.items():
        module.training = training
    return seen
