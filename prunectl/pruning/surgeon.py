"""Optimal Brain Surgeon for channels: what a layer's readers lose when channels go and the survivors stand in for them.

A reader with weights W (C, D) of inputs with covariance K puts out the variance |W' K^(1/2)|^2. Without the channels R, and with the mix of
the survivors S added to their weights that is nearest in the least-squares sense (`reconstruct`), it is left with the error
tr W_R' (K_RR - K_RS K_SS^-1 K_SR) W_R. With H = K^-1, one more channel k adds |w_k|^2 / H_kk to it, after which

    W <- W - h w_k',   H <- H - H_kk h h',   h = H[:, k] / H_kk

hold for those that are left: the step of Hassibi & Stork (1993), with a channel in the place of a weight and the reader's true
quadratic error in the place of a Hessian. Two units on one side of one hyperplane are multiples of each other and cost nothing; so does a
unit that is a mix of several others, which no comparison of pairs would find. Only |w_k|^2 is needed, so that W is carried as its
Gram matrix. Changes are gathered and applied a block at a time, as matrix products: for C channels about 4 C^3 operations a reader. Within
a block a step is a few operations on short vectors, for all readers at once, in NumPy, whose calls cost a fraction of PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunectl.errors import VerificationFailed

RIDGE = 1e-3  # of the mean variance: keeps the solve well-posed where channels are dead or copies of each other
BLOCK = 128
_TINY = 1e-30


def removal_errors(readers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(C,) the error that each channel's removal adds for all readers, the cheapest first, after those before it: the lower, the
    more redundant. Never falls along that order, so that one pass ranks the layer for every ratio.

    readers: for each the covariance of its inputs (C, C) and W W' (C, C) of its weights, float64. Raises VerificationFailed when they
    are not finite."""
    if not all(bool(t.isfinite().all()) for reader in readers for t in reader):
        raise VerificationFailed("channels cannot be ranked: what their readers are given, or their weights, is not finite")
    h, g = torch.stack([_inverse(covariance) for covariance, _ in readers]), torch.stack([gram for _, gram in readers])
    channels = torch.arange(h.shape[-1])
    errors = torch.zeros(len(channels), dtype=torch.float64)
    last = 0.0
    while len(channels):
        block = _remove(h.numpy(), g.numpy(), min(BLOCK, len(channels)))
        for k, cost in zip(channels[block.gone].tolist(), block.costs, strict=True):
            last = max(math.nextafter(last, math.inf), cost)  # no ties: the order is the greedy one
            errors[k] = last
        lengths, v, u = (torch.from_numpy(a) for a in (block.lengths[..., None], block.v, block.u))
        left = len(channels) - len(block.gone)
        holes, moved = _moves(block.gone, left)
        for t in (channels, v, u, h, g):  # the last channels that stay fill the holes: the matrices shrink where they are
            t[..., holes] = t[..., moved]
        for t in (h, g):
            t[:, holes] = t[:, moved]
        channels, v, u, h, g = channels[:left], v[..., :left], u[..., :left], h[:, :left, :left], g[:, :left, :left]
        h.baddbmm_(v.mT, lengths * v, alpha=-1)
        g.baddbmm_(torch.cat([v, u], 1).mT, torch.cat([u, v], 1), alpha=-1)
    return errors


class _Block(NamedTuple):
    """Channels that go one after another, and what that changes, for each of R readers: removal i changes
    H by -lengths[:, i] v_i v_i' and G = W W' by -(v_i u_i' + u_i v_i')."""

    gone: list[int]
    costs: list[float]
    lengths: NDArray[np.float64]  # (R, n)
    v: NDArray[np.float64]  # (R, n, C)
    u: NDArray[np.float64]  # (R, n, C)


def _remove(h: NDArray[np.float64], g: NDArray[np.float64], count: int) -> _Block:
    """h, g: H and G (R, C, C) as they are before the block; both are left alone."""
    readers, channels, _ = h.shape
    block = _Block([], [], np.zeros((readers, count)), *np.zeros((2, readers, count, channels)))
    of_h, of_g = (t.diagonal(axis1=1, axis2=2).copy() for t in (h, g))
    for n in range(count):
        cost = (np.maximum(of_g, 0) / np.maximum(of_h, _TINY)).sum(0)
        k = int(cost.argmin())
        block.gone.append(k)
        block.costs.append(float(cost[k]))
        lengths, v, u = block.lengths[:, :n], block.v[:, :n], block.u[:, :n]
        at_v, at_u = v[:, None, :, k], u[:, None, :, k]
        row_h = h[:, k] - (lengths[:, None] * at_v @ v)[:, 0]
        row_g = g[:, k] - (at_v @ u + at_u @ v)[:, 0]
        length = np.maximum(row_h[:, k, None], _TINY)
        new_v = row_h / length
        new_u = row_g - row_g[:, k, None] / 2 * new_v
        block.lengths[:, n], block.v[:, n], block.u[:, n] = length[:, 0], new_v, new_u
        of_h -= length * new_v * new_v
        of_g -= 2 * new_v * new_u
        of_g[:, k] = np.inf  # never the cheapest again
    return block


def _inverse(covariance: Tensor) -> Tensor:
    ridge, eye = RIDGE * covariance.diagonal().mean().clamp(min=_TINY), torch.eye(len(covariance), dtype=covariance.dtype)
    factor, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
    while failed:  # a few channels hold all the variance: the rounding of the products is larger than the ridge
        ridge = 10 * ridge
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
    return torch.cholesky_inverse(factor)


def _moves(gone: Sequence[int], left: int) -> tuple[Tensor, Tensor]:
    """Places below `left` that are empty, and as many at or above it that are not."""
    empty = set(gone)
    holes = [k for k in gone if k < left]
    moved = [k for k in range(left, left + len(gone)) if k not in empty]
    return torch.tensor(holes, dtype=torch.int64), torch.tensor(moved, dtype=torch.int64)
