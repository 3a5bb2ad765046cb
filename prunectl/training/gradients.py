"""Mean gradient of the training loss over a few batches, for criteria that look at it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating
from prunectl.training.precision import Placement


def mean_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], place: Placement) -> dict[str, Tensor]:
    """Parameter name -> gradient of the cross-entropy, averaged over `batches`, in eval mode; modes are restored.

    Frozen parameters have one too: their channels may go. Not in float16, whose small gradients would vanish without a scaled loss."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    n = 0
    with evaluating(model), _thawed(named.values()):
        for x, y in batches:
            with nullcontext() if place.autocast_dtype == torch.float16 else place.autocast():
                logits = model(place.images(x))
            loss = F.cross_entropy(logits.float(), y.to(place.device))
            for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
                if g is not None:
                    total[name] += g
            n += 1
    return {name: g / max(1, n) for name, g in total.items()}


@contextmanager
def _thawed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
