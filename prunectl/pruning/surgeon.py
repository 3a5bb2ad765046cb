"""Optimal Brain Surgeon for channels: what a layer's readers lose when channels go and the survivors stand in for them.

A reader with weights W (C, D) of inputs with covariance K puts out the variance |W' K^(1/2)|^2. Without the channels R, and with the mix of
the survivors S added to their weights that is nearest in the least-squares sense (`reconstruct`), it is left with the error
tr W_R' (K_RR - K_RS K_SS^-1 K_SR) W_R. With H = K^-1, one more channel k adds |w_k|^2 / H_kk to it, after which

    W <- W - h w_k',   H <- H - H_kk h h',   h = H[:, k] / H_kk

hold for those that are left: the step of Hassibi & Stork (1993), with a channel in the place of a weight and the reader's true
quadratic error in the place of a Hessian. Two units on one side of one hyperplane are multiples of each other and cost nothing; so does a
unit that is a mix of several others, which no comparison of pairs would find. Only |w_k|^2 is needed, so that W is carried as its
Gram matrix. Changes are gathered and applied a block at a time, as matrix products: for C channels about 6 C^3 operations a reader."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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
    systems = [_Reader(covariance, gram) for covariance, gram in readers]
    left = torch.arange(len(readers[0][0]))
    errors = torch.zeros(len(left), dtype=torch.float64)
    last = 0.0
    while len(left):
        stays = torch.ones(len(left), dtype=torch.bool)
        for _ in range(min(BLOCK, len(left))):
            cost = torch.stack([s.costs() for s in systems]).sum(0).where(stays, torch.inf)
            k = int(cost.argmin())
            last = max(math.nextafter(last, math.inf), float(cost[k]))  # no ties: the order is the greedy one
            errors[left[k]] = last
            stays[k] = False
            for s in systems:
                s.remove(k)
        for s in systems:
            s.settle(stays)
        left = left[stays]
    return errors


class _Reader:
    """H and G = W W' of the channels that are left at the start of a block, and what the block's removals change in them.

    Removal i changes H by -lengths[i] v_i v_i' and G by -(v_i u_i' + u_i v_i')."""

    def __init__(self, covariance: Tensor, gram: Tensor) -> None:
        ridge, eye = RIDGE * covariance.diagonal().mean().clamp(min=_TINY), torch.eye(len(covariance), dtype=covariance.dtype)
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
        while failed:  # a few channels hold all the variance: the rounding of the products is larger than the ridge
            ridge = 10 * ridge
            factor, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
        self.h = torch.cholesky_inverse(factor)
        self.g = gram
        self._begin()

    def costs(self) -> Tensor:
        return torch.div(self.of_g.clamp(min=0), self.of_h.clamp(min=_TINY))

    def remove(self, k: int) -> None:
        n = self.n
        v, u, lengths = self.v[:n], self.u[:n], self.lengths[:n]
        h = self.h[:, k] - (lengths * v[:, k]) @ v
        g = self.g[:, k] - v[:, k] @ u - u[:, k] @ v
        length = h[k].clamp(min=_TINY)
        self.v[n] = h / length
        self.u[n] = g - g[k] / 2 * self.v[n]
        self.lengths[n] = length
        self.of_h -= length * self.v[n].square()
        self.of_g -= 2 * self.v[n] * self.u[n]
        self.n += 1

    def settle(self, stays: Tensor) -> None:
        left = stays.nonzero().flatten()
        v, u, lengths = self.v[: self.n, left], self.u[: self.n, left], self.lengths[: self.n, None]
        self.h = self.h[left[:, None], left].addmm_(v.T, lengths * v, alpha=-1)
        self.g = self.g[left[:, None], left].addmm_(torch.cat([v, u]).T, torch.cat([u, v]), alpha=-1)
        self._begin()

    def _begin(self) -> None:
        self.n = 0
        self.of_h, self.of_g = self.h.diagonal().clone(), self.g.diagonal().clone()
        self.v, self.u = (self.h.new_zeros(BLOCK, len(self.h)) for _ in range(2))
        self.lengths = self.h.new_zeros(BLOCK)
