"""Eq. 2, the greedy removal and the activation code of spline early-bird tickets, in the slowest and plainest NumPy.

H. You, R. Balestriero et al., Max-Affine Spline Insights Into Deep Network Pruning, TMLR 2022."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def hyperplane_distance(w1, b1, w2, b2, rho):
    """1 - |cos| + rho |b1/|w1| - sgn(cos) b2/|w2||, one pair at a time."""
    n1, n2 = np.sqrt(np.dot(w1, w1)), np.sqrt(np.dot(w2, w2))
    cosine = np.dot(w1, w2) / (n1 * n2)
    sign = -1.0 if cosine < 0 else 1.0
    return 1 - min(1.0, abs(cosine)) + rho * abs(b1 / n1 - sign * b2 / n2)


def signed_distance(w1, b1, w2, b2, rho):
    n1, n2 = np.sqrt(np.dot(w1, w1)), np.sqrt(np.dot(w2, w2))
    return 1 - np.clip(np.dot(w1, w2) / (n1 * n2), -1, 1) + rho * abs(b1 / n1 - b2 / n2)


def published_distance(w1, b1, w2, b2, rho):
    n1, n2 = np.sqrt(np.dot(w1, w1)), np.sqrt(np.dot(w2, w2))
    return 1 - min(1.0, abs(np.dot(w1, w2) / (n1 * n2))) + rho * abs(b1 - b2)


def greedy_removal(filters, bias, energy, *, rho, distance, priced):
    """(score, keeper): again and again the cheapest pair, every price computed afresh, loses its weaker unit."""
    units = len(filters)
    score, keeper = np.full(units, -1.0), np.full(units, -1)
    left = [u for u in range(units) if np.any(filters[u] != 0)]
    last = 0.0
    while len(left) > 1:
        pairs = []
        for i in left:
            for j in left:
                if i < j:
                    weight = min(energy[i], energy[j]) if priced else 1
                    pairs.append((distance(filters[i], bias[i], filters[j], bias[j], rho) * weight, i, j))
        last, i, j = min(pairs)
        loser, winner = (i, j) if energy[i] <= energy[j] else (j, i)
        score[loser], keeper[loser] = last, winner
        left.remove(loser)
    for u in left:
        score[u] = last + 1
    return score, keeper


def units(bits):
    """(N, U): position after position, all channels of each."""
    return (bits.permute(0, 2, 3, 1) if bits.dim() == 4 else bits).flatten(1).numpy().copy()


def relu_code(model, probe):
    """[(N, U) bool] per ReLU module in calling order, by a hook on each; for nets whose every ReLU is an nn.ReLU."""
    seen = []
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    hooks = [m.register_forward_pre_hook(lambda _m, args: seen.append(units(args[0] > 0))) for m in relus]
    with torch.no_grad():
        model(probe)
    for hook in hooks:
        hook.remove()
    return seen


def code_distance(a, b):
    """The mean over layers of the share of unequal bits, bit by bit."""
    shares = []
    for x, y in zip(a, b, strict=True):
        shares.append(sum(int(p != q) for p, q in zip(x.ravel(), y.ravel(), strict=True)) / x.size)
    return sum(shares) / len(shares)
