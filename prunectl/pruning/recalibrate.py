"""Batch-norm statistics estimated anew after channels or weights were removed. Not retraining: no weight is learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating


def recalibrate_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replaces the running statistics of every batch norm by their cumulative mean over `batches` of inputs.

    The statistics become those of the pruned network on training images, without augmentation. All other modules stay
    in eval mode (dropout off). Returns the number of images seen; with no batch norm nothing runs, and with no batch of at
    least two images the statistics stay as they were."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = {m: m.momentum for m in norms}
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in norms]
    seen = 0
    try:
        with evaluating(model), torch.no_grad():
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # cumulative mean
                m.train()
            for x in batches:
                if len(x) > 1:  # one image has no variance where a map is one pixel
                    model(x)
                    seen += len(x)
    finally:
        for m, state in zip(norms, before, strict=True):
            m.momentum = momenta[m]
            if not seen:
                m.load_state_dict(state)
    return seen
