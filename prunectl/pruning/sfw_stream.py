"""The Frank-Wolfe step of large CPU tensors on most sets, streamed through the cache in two or three passes.

K-sparse, k-support, N:M and L2 sets have the vertex v = -c u, where u is sign(m) or m on the entries that the set keeps and 0
elsewhere. For the k largest |m|, a pass over parts that fit the cache averages the gradient into m and scans |m| for the k-th
largest, a second makes u and the sums that |w - v| and c need; N:M groups are known one by one, so that one pass does both. The
last pass moves w. The plain step (`frank_wolfe_step`) is eight passes over memory, and memory is what a step waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prunectl.pruning.constraints import NM, ConstraintSet, KSparse, KSupport, LpBall
from prunectl.pruning.nm import mark_kept_
from prunectl.pruning.topk import (
    CHUNK,
    PARTITION_UPTO,
    Bracket,
    Scan,
    bits_of,
    is_dense,
    keep_at_least_,
    kth_largest,
    last_ties,
    like,
    memory_order,
)

_CANCELLED = 0.1  # below this share of |w|^2, rounding of the sums would show in |w - v|: subtract entry by entry


class Job(NamedTuple):
    """One tensor's step: weights, momentum, gradient, laid out alike; `weight` is the gradient's share in the average.

    gamma is length |m| / |w - v| if `rescaled`, else `length`."""

    w: Tensor
    m: Tensor
    g: Tensor
    constraint: KSparse | KSupport | NM | LpBall
    weight: float
    rescaled: bool
    length: float
    bracket: Bracket


def fits(p: Tensor, g: Tensor, constraint: ConstraintSet) -> bool:
    """Whether a tensor can be stepped this way: float32 or float64 on the CPU, all of it in one layout."""
    same = p.device.type == "cpu" and p.dtype == g.dtype and p.dtype in (torch.float32, torch.float64) and p.stride() == g.stride()
    known = isinstance(constraint, KSparse | KSupport | NM) or (isinstance(constraint, LpBall) and constraint.p == 2)
    return known and same and is_dense(p)


class Groups(NamedTuple):
    """Of every m entries that lie a stride apart in memory, a vertex keeps n."""

    n: int
    m: int
    stride: int


def groups_of(job: Job) -> Groups | None:
    """The groups of an N:M set; an L2 ball keeps one of every one."""
    if isinstance(job.constraint, NM):
        return Groups(job.constraint.n, job.constraint.m, job.m.stride(1))
    return Groups(1, 1, 1) if isinstance(job.constraint, LpBall) else None


def step_(job: Job, memory: Tensor | None) -> float:
    """w and m moved by one step, in place; returns gamma before it is clamped to 1, 0 if nothing moved.

    memory: 1-D, to lay u over (`topk.like`); new memory costs more than the step."""
    shaped = like(job.m, memory)
    groups = groups_of(job)
    norm2, ww, wu, uu = _average_and_mark_(job, shaped, groups) if groups else _average_and_select_(job, shaped)
    if not norm2 or not uu:
        return 0.0
    w, u = memory_order(job.w.detach()), memory_order(shaped)
    scale = -job.constraint.radius / (1.0 if isinstance(job.constraint, KSparse) else math.sqrt(uu))
    distance2 = ww - 2 * scale * wu + scale * scale * uu
    if distance2 < _CANCELLED * ww:
        distance2 = sum(float((x - scale * y).square().sum()) for x, y in _parts(w, u))
    if not distance2:
        return 0.0
    gamma = job.length * math.sqrt(norm2 / distance2) if job.rescaled else job.length
    for x, y in _parts(w, u):
        x.lerp_(y.mul_(scale), min(gamma, 1.0))
    return gamma


def _average_and_mark_(job: Job, shaped: Tensor, groups: Groups) -> tuple[float, float, float, float]:
    """m averaged, u = m where its group keeps it, else 0; (|m|^2, |w|^2, <w, u>, |u|^2)."""
    w, m, g, u = (memory_order(x.detach()) for x in (job.w, job.m, job.g, shaped))
    size = max(1, CHUNK // (groups.m * groups.stride)) * groups.m * groups.stride
    kept = np.empty(min(size, m.numel()), bool)
    norm2 = ww = wu = uu = 0.0
    with np.errstate(over="ignore"):
        for x, y, z, v in zip(*(torch.split(part, size) for part in (m, g, w, u)), strict=True):
            average, a, b, marks = x.lerp_(y, job.weight).numpy(), z.numpy(), v.numpy(), kept[: x.numel()]
            if groups.n < groups.m:
                mark_kept_(marks, bits_of(x), *groups)
                np.multiply(average, marks, out=b)
            else:
                np.copyto(b, average)
            norm2 += float(np.dot(average, average))
            ww, wu, uu = ww + float(np.dot(a, a)), wu + float(np.dot(a, b)), uu + float(np.dot(b, b))
    return norm2, ww, wu, uu


def _average_and_select_(job: Job, shaped: Tensor) -> tuple[float, float, float, float]:
    """m averaged, u = sign(m) or m on its k largest magnitudes, else 0; (|m|^2, |w|^2, <w, u>, |u|^2)."""
    assert isinstance(job.constraint, KSparse | KSupport)
    w, m, g, u = (memory_order(x.detach()) for x in (job.w, job.m, job.g, shaped))
    k = min(job.constraint.k, m.numel())
    norm2, found = _average_(m, g, job.weight, k, job.bracket)
    kth, surplus = found or kth_largest(bits_of(m), k)
    job.bracket.saw(kth, m.dtype)
    ww, wu, uu = _direct_(u, w, m, kth, isinstance(job.constraint, KSparse))
    if surplus and kth:
        ties = last_ties(job.m, kth, surplus)
        wu -= float((job.w.detach()[ties] * shaped[ties]).sum())
        uu -= float(shaped[ties].square().sum())
        shaped[ties] = 0
    return norm2, ww, wu, uu


def _average_(m: Tensor, g: Tensor, weight: float, k: int, bracket: Bracket) -> tuple[float, tuple[int, int] | None]:
    """m moved towards g; (|m|^2, the k-th largest and its surplus if the bracket held it)."""
    scan = Scan(*bracket.guess, bits_of(m).dtype) if bracket.guess and m.numel() > PARTITION_UPTO else None
    norm2 = 0.0
    with np.errstate(over="ignore"):  # a length beyond the range is a clamped step
        for x, y in _parts(m, g):
            values = x.lerp_(y, weight).numpy()
            norm2 += float(np.dot(values, values))
            if scan:
                scan.add(bits_of(x))
    return norm2, scan.kth_largest(k) if scan else None


def _direct_(u: Tensor, w: Tensor, m: Tensor, kth: int, signs: bool) -> tuple[float, float, float]:
    """u = sign(m) or m where |m| is at least the k-th largest, else 0; (|w|^2, <w, u>, |u|^2)."""
    ww = wu = uu = 0.0
    for x, y, z in _parts(u, w, m):
        keep_at_least_(x, z, kth)
        if signs:
            x.sign_()
        a, b = y.numpy(), x.numpy()
        ww, wu, uu = ww + float(np.dot(a, a)), wu + float(np.dot(a, b)), uu + float(np.dot(b, b))
    return ww, wu, uu


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].numel() <= CHUNK:
        return iter([tensors])
    return zip(*(torch.split(x, CHUNK) for x in tensors), strict=True)
