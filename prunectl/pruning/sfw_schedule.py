"""The factor that follows the training loss, a pure function of the epochs so far: nothing to save or resume.

The published schedule of Lu et al., ICLR 2022, drops the rate at a third and two thirds of the run and, every five epochs from
epoch 25 on, takes it x0.7 if the mean training loss rose, x1.06 if it fell; this is the second part. Differs: the losses are true
epoch means and the window ends with the newest one (the published code looks at last batches and misses an epoch), and the rule
is off below 60 epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

ADAPTIVE_FROM_EPOCH, ADAPTIVE_EVERY, ADAPTIVE_MIN_EPOCHS = 25, 5, 60
RISE, FALL = 0.7, 1.06


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
