"""How many weights of each magnitude a tensor has: what one-shot pruning will find to remove."""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENTS = tuple(range(1, -11, -1))  # 10^1 down to 10^-10, as Lu et al. log them


def counts_above(w: Tensor) -> Tensor:
    """(12,) int64: the number of entries whose magnitude is above 10^1, 10^0, ..., 10^-10. One pass, nothing read back."""
    ascending = torch.tensor([10.0**e for e in reversed(EXPONENTS)], dtype=w.dtype, device=w.device)
    passed = torch.bucketize(w.detach().abs().flatten(), ascending)  # how many thresholds lie strictly below each entry
    exactly = torch.zeros(len(ascending) + 1, dtype=torch.int64, device=w.device).scatter_add_(0, passed, torch.ones_like(passed))
    return exactly.flip(0).cumsum(0)[:-1]
