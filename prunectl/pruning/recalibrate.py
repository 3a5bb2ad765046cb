"""Batch-norm statistics estimated anew after channels or weights were removed. Not retraining: no weight is learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating


def recalibrate_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replaces the running statistics of every batch norm by their mean over the images of all `batches` of inputs.

    Of two batches the larger weighs more, so that a short last one spoils nothing. The statistics become those of the
    pruned network on training images, without augmentation. All other modules stay in eval mode (dropout off). Returns the
    number of images seen; with no batch norm nothing runs, and with no batch of at least two images the statistics stay as
    they were, as do those of a norm that does not train or is not called as a module."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = {m: m.momentum for m in norms}
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in norms]
    seen, hooks = 0, []
    counters = {m: _Cumulative() for m in norms}
    try:
        with evaluating(model), torch.no_grad():
            for m in norms:
                m.reset_running_stats()
                hooks.append(m.register_forward_pre_hook(counters[m], with_kwargs=True))
                m.train()
            for x in batches:
                if len(x) > 1:  # one image has no variance where a map is one pixel
                    model(x)
                    seen += len(x)
    finally:
        for hook in hooks:
            hook.remove()
        for m, state in zip(norms, before, strict=True):
            m.momentum = momenta[m]
            if not (seen and counters[m].seen and m.num_batches_tracked):
                m.load_state_dict(state)
    return seen


class _Cumulative:
    """Before each of one batch norm's calls, the momentum that makes its statistics the mean over all images so far."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        images = len(inputs[0] if inputs else named["input"])
        self.seen += images
        norm.momentum = images / self.seen
