"""Accuracy of a network on a split, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunectl import dist
from prunectl.pruning.modes import evaluating
from prunectl.training.precision import Placement


@dataclass(frozen=True)
class Accuracy:
    """Percent of images whose class is the first guess, among the first five (None below six classes), and mean loss."""

    top1: float
    top5: float | None
    loss: float
    images: int


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], place: Placement) -> Accuracy:
    """Of `model` in eval mode over `batches` of (x, y); modes are restored. With several ranks each brings its share."""
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)  # right at 1, right within 5, loss, images
    classes = 0
    with evaluating(model), torch.no_grad():
        for x, y in batches:
            with place.autocast():
                logits = model(place.images(x)).float()
            y = y.to(place.device, non_blocking=True)
            classes = logits.shape[1]
            guesses = logits.topk(min(5, classes), dim=1).indices == y[:, None]
            loss = F.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([guesses[:, 0].sum(), guesses.any(1).sum(), loss.double(), torch.tensor(len(y), device=place.device)])
    right, within5, loss_sum, n = dist.summed(sums).tolist()
    n = max(n, 1)
    return Accuracy(100 * right / n, 100 * within5 / n if classes > 5 else None, loss_sum / n, int(n))
