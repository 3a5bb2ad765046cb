"""WHICH channels go: one function a criterion, from a group of coupled channels to (C,) scores; the lowest go first.

A criterion is deterministic, leaves its input alone and follows a permutation of the channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunectl.errors import Unsatisfiable
from prunectl.pruning import spline as geometry
from prunectl.pruning.channels import Channels
from prunectl.pruning.surgeon import removal_errors
from prunectl.registry import Registry

criteria = Registry("criterion", "pruning/criteria.py")


@criteria.register
def spline(c: Channels) -> Tensor:
    """Distance of each unit's hyperplane to its nearest copy (You et al. 2022, Eq. 2), batch norm folded, times what it gives on."""
    return _spline(c, geometry.hyperplane_distances)


@criteria.register
def spline_signed(c: Channels) -> Tensor:
    """As spline, but units that open to opposite sides of one boundary are no copies."""
    return _spline(c, geometry.signed_distances)


@criteria.register
def spline_published(c: Channels) -> Tensor:
    """Eq. 2 to the letter: the closest pair first, biases neither normalised nor signed."""
    return _spline(c, geometry.published_distances, priced=False)


@criteria.register
def bn_scale(c: Channels) -> Tensor:
    """Mean |gamma| of the channel's batch norms (network slimming, Liu et al. 2017)."""
    if c.gammas.shape[1] == 0:
        raise Unsatisfiable(f"criterion bn-scale: the channels of {c.name} pass through no batch norm; use another criterion, e.g. spline")
    return c.gammas.mean(1).double()


@criteria.register
def l1(c: Channels) -> Tensor:
    """L1 norm of the channel's filters (Li et al. 2017)."""
    return c.weights.double().abs().sum(1)


@criteria.register
def l2(c: Channels) -> Tensor:
    """L2 norm of the channel's filters."""
    return c.weights.double().square().sum(1).sqrt()


@criteria.register
def fpgm(c: Channels) -> Tensor:
    """Sum of distances to all other filters: those near the geometric median go (He et al. 2019)."""
    w = c.weights.double()
    squares = w.square().sum(1)
    return (squares[:, None] + squares[None, :] - 2 * w @ w.T).clamp(min=0).sqrt().sum(1)


@criteria.register
def taylor(c: Channels) -> Tensor:
    """Squared first-order change of the training loss if the channel's filters were zero (Molchanov et al. 2019)."""
    if c.gradients is None:
        raise Unsatisfiable("criterion taylor needs gradients of the training loss, and none were given")
    return (c.weights.double() * c.gradients.double()).sum(1).square()


@criteria.register
def obs(c: Channels) -> Tensor:
    """Error left at the channel's readers when those that stay stand in for it, on training images (Hassibi & Stork 1993)."""
    if c.readers is None:
        raise Unsatisfiable("criterion obs needs the covariance of what the layers read, and none was given")
    return removal_errors(c.readers) if c.readers else c.scale.double()


@criteria.register(name="random")
def random_(c: Channels) -> Tensor:
    """A seeded draw: the baseline every criterion has to beat."""
    return torch.rand(len(c.bias), generator=torch.Generator().manual_seed(c.seed), dtype=torch.float64)


def _spline(c: Channels, distances: Callable[..., Tensor], *, priced: bool = True) -> Tensor:
    return geometry.spline_scores(c.filters, c.bias, c.scale * c.outgoing, rho=c.rho, distances=distances, priced=priced)
