"""Stochastic Frank-Wolfe as one would write it down: NumPy, row-major, one tensor, no shortcut. Slow and obvious on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

Array = np.ndarray
Vertex = Callable[[Array], Array]


def largest(x: Array, k: int) -> Array:
    """Flat indices of the k largest magnitudes, ties to the lowest index."""
    return np.argsort(-np.abs(x).ravel(), kind="stable")[:k]


def k_sparse(g: Array, k: int, radius: float) -> Array:
    v = np.zeros(g.size, g.dtype)
    for i in largest(g, k):
        v[i] = -radius * np.sign(g.flat[i])
    return v.reshape(g.shape)


def k_support(g: Array, k: int, radius: float) -> Array:
    kept = np.zeros(g.size, g.dtype)
    for i in largest(g, k):
        kept[i] = g.flat[i]
    return onto_sphere(kept.reshape(g.shape), radius)


def group_k_support(g: Array, k: int, radius: float) -> Array:
    norms = np.array([np.linalg.norm(f) for f in g])
    kept = np.zeros_like(g)
    for c in largest(norms, k):
        kept[c] = g[c]
    return onto_sphere(kept, radius)


def nm(g: Array, n: int, m: int, radius: float) -> Array:
    kept = np.zeros_like(g)
    for out in range(g.shape[0]):
        for first in range(0, g.shape[1], m):
            for position in np.ndindex(g.shape[2:]):
                group = np.array([g[(out, first + j, *position)] for j in range(m)])
                for j in largest(group, n):
                    kept[(out, first + j, *position)] = group[j]
    return onto_sphere(kept, radius)


def lp(g: Array, p: float, radius: float) -> Array:
    if p == 1:
        return k_sparse(g, 1, radius)
    if p == np.inf:
        return -radius * np.sign(g)
    q = p / (p - 1)
    direction = np.sign(g) * np.abs(g) ** (q - 1)
    norm = np.sum(np.abs(direction) ** p) ** (1 / p)
    return -radius * direction / norm if norm else direction


def onto_sphere(x: Array, radius: float) -> Array:
    norm = np.linalg.norm(x)
    return -radius * x / norm if norm else x


def step(
    w: Array, m: Array | None, g: Array, vertex: Vertex, *, lr: float, momentum: float, rescale: str, diameter: float
) -> tuple[Array, Array]:
    """(w, m) after one step of Algorithm 1 of Lu et al., ICLR 2022; m is None before the first."""
    m = g.copy() if m is None else momentum * m + (1 - momentum) * g
    v = vertex(m)
    distance = np.linalg.norm(w - v)
    if not np.any(m) or distance == 0:
        return w, m
    gamma = {"gradient": lr * np.linalg.norm(m) / distance, "diameter": lr / diameter, "none": lr}[rescale]
    gamma = min(gamma, 1.0)
    return (1 - gamma) * w + gamma * v, m


def supports(n: int, k: int) -> Iterator[list[int]]:
    """Every set of k out of n indices."""
    return (list(s) for s in itertools.combinations(range(n), min(k, n)))


def lowest_k_sparse(g: Array, k: int, radius: float) -> float:
    """min <v, g> over all vertices of the K-sparse polytope, by listing them."""
    signs = list(itertools.product([-radius, radius], repeat=min(k, g.size)))
    return min(float(np.dot(g[s], sign)) for s in supports(g.size, k) for sign in signs)


def lowest_k_support(g: Array, k: int, radius: float) -> float:
    """min <v, g> over |v| <= radius with at most k non-zeros: on each support it is -radius |g_S|."""
    return min(-radius * float(np.linalg.norm(g[s])) for s in supports(g.size, k))


def lowest_group_k_support(g: Array, k: int, radius: float) -> float:
    return min(-radius * float(np.linalg.norm(g[s])) for s in supports(len(g), k))


def lowest_nm(g: Array, n: int, m: int, radius: float) -> float:
    """g: (1, channels); every choice of n out of each group of m."""
    groups = [[[first + i for i in s] for s in supports(m, n)] for first in range(0, g.size, m)]
    choices = (list(itertools.chain(*choice)) for choice in itertools.product(*groups))
    return min(-radius * float(np.linalg.norm(g.ravel()[s])) for s in choices)


def lowest_lp(g: Array, p: float, radius: float) -> float:
    """-radius times the dual norm (Hoelder)."""
    q = {1: np.inf, np.inf: 1}.get(p) or p / (p - 1)
    return -radius * float(np.linalg.norm(g.ravel(), q))
