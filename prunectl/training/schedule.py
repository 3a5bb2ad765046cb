"""The learning rate as a pure function of how much of the schedule is done, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(done: float, *, lr: float, schedule: str, milestones: Sequence[float] = (), warmup: float = 0.0) -> float:
    """The rate after the share `done` in [0, 1) of all steps.

    multistep divides by 10 at each milestone; cosine falls to zero; both are shares of the schedule, so that a
    shortened run still anneals. warmup: share of the schedule in which the rate rises linearly from lr/10."""
    if done < warmup:
        return lr * (0.1 + 0.9 * done / warmup)
    if schedule == "multistep":
        return lr * 0.1 ** sum(done >= m for m in milestones)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    return lr
