"""Fading: only what a mask would remove shrinks, by the share asked for, and no constraint set is left by it."""

from __future__ import annotations

import pytest
import torch

from prunectl.pruning.constraints import NM, GroupKSupport, KSparse, KSupport, LpBall
from prunectl.pruning.fade import HARDEST, fade_, targets
from prunectl.pruning.oneshot import global_masks

SETS = [
    KSparse(k=5, radius=2.0),
    KSupport(k=5, radius=2.0),
    GroupKSupport(k=2, radius=2.0),
    NM(n=2, m=4, radius=2.0),
    LpBall(p=3.0, radius=2.0),
]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"conv": torch.randn(8, 4, 3, 3, generator=g), "linear": torch.randn(10, 12, generator=g)}


@pytest.mark.parametrize("share", [0.0, 0.125, 1.0, 7.0])
def test_what_goes_shrinks_and_what_stays_does_not_move(share: float) -> None:
    before, after = weights(), weights()
    masks = global_masks(before, 0.8)
    fade_(after, masks, share)
    for name, keep in masks.items():
        assert torch.equal(after[name][keep], before[name][keep])
        assert torch.allclose(after[name][~keep], before[name][~keep] * (1 - min(share, HARDEST)), rtol=1e-6)
    assert sum(int((~keep).sum()) for keep in masks.values()) == round(0.8 * (8 * 4 * 9 + 120))


def test_there_is_a_target_for_each_ratio_and_one_for_the_pattern() -> None:
    kept = [t(weights()) for t in targets([0.5, 0.9], pattern=(2, 4))]
    shares = [sum(int(k.sum()) for k in masks.values()) / sum(k.numel() for k in masks.values()) for masks in kept]
    assert shares == pytest.approx([0.5, 0.1, 0.5], abs=0.002)
    assert not (kept[1]["conv"] & ~kept[0]["conv"]).any(), "what stays at 90 % stays at 50 % too"
    layerwise = targets([0.5], layerwise=True)[0](weights())
    assert all(k.float().mean() == 0.5 for k in layerwise.values())


@pytest.mark.parametrize("constraint", SETS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("seed", range(5))
def test_fading_leaves_no_set(constraint, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Gauges are norms of magnitudes that fall with each of them; 1e-6 for the rounding of float32 sums."""
    w = weights(seed)
    before = float(constraint.gauge(w["conv"]))
    for target in targets([0.3, 0.6, 0.9], pattern=(2, 4)):
        fade_(w, target(w), 0.5)
        now = float(constraint.gauge(w["conv"]))
        assert now <= before * (1 + 1e-6)
        before = now
