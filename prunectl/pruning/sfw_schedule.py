"""Learning rates of a Frank-Wolfe run, each a pure function of what is known when an epoch starts: nothing to save or resume.

The published schedule of Miao et al., ICLR 2022, is two factors on the base rate: /10 at epochs 61 and 121 of 180, and every
five epochs from epoch 25 on x0.7 if the mean training loss rose, x1.06 if it fell. Differs: the losses are true epoch means and
the window ends with the newest one (the published code looks at last batches and misses an epoch); milestones are shares of
the schedule, so that a shorter run anneals too, and the adaptive rule is off below 60 epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

MILESTONES = (1 / 3, 2 / 3)
ADAPTIVE_FROM_EPOCH, ADAPTIVE_EVERY, ADAPTIVE_MIN_EPOCHS = 25, 5, 60
RISE, FALL = 0.7, 1.06


def published_lr(base_lr: float, epoch_losses: Sequence[float], epochs: int) -> float:
    """The rate of the next epoch, given the mean training loss of every epoch so far and the epochs of the whole run."""
    return base_lr * milestone_factor(len(epoch_losses), epochs) * adaptive_scale(epoch_losses, epochs)


def milestone_factor(epoch: int, epochs: int) -> float:
    """1, then 0.1, then 0.01: `epoch` counts from 0, the drops are at a third and two thirds of `epochs`."""
    return math.prod(0.1 for share in MILESTONES if epoch >= round(share * epochs))


def adaptive_scale(epoch_losses: Sequence[float], epochs: int) -> float:
    """All adaptive factors so far, multiplied; 1 in runs of fewer than 60 epochs."""
    if epochs < ADAPTIVE_MIN_EPOCHS:
        return 1.0
    return math.prod(adaptive_factor(epoch_losses[:done]) for done in range(len(epoch_losses) + 1))


def adaptive_factor(epoch_losses: Sequence[float]) -> float:
    """0.7 if the mean loss of the last five epochs is above that of the last ten, 1.06 if below; 1 when it is not yet due."""
    done = len(epoch_losses)
    if done < ADAPTIVE_FROM_EPOCH or done % ADAPTIVE_EVERY:
        return 1.0
    recent, longer = sum(epoch_losses[-5:]) / 5, sum(epoch_losses[-10:]) / 10
    return RISE if recent > longer else FALL if recent < longer else 1.0


def cosine_lr(base_lr: float, step: int, steps: int) -> float:
    """From base_lr at step 0 towards 0 at step `steps`, along half a cosine."""
    return base_lr * (1 + math.cos(math.pi * step / steps)) / 2
