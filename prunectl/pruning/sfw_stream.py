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
from prunectl.pruning.nm import check_groups, mark_kept_
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

_NEAR = 0.1  # |w - v|^2 below this share of |w|^2: rounding of the sums would show in it
_SQUARES = 1e-30, 1e38  # sums of squares of float32 that nothing was lost of, to either side
_SHORT = 1 << 15  # entries whose squares float32 adds up to a millionth, equal ones too


class Groups(NamedTuple):
    """Of every m entries that lie a stride apart in memory, a vertex keeps n."""

    n: int
    m: int
    stride: int


class Job(NamedTuple):
    """One tensor's step: weights, momentum, gradient, laid out alike; `weight` is the gradient's share in the average.

    gamma is length |m| / |w - v| if `rescaled`, else `length`. Either `groups` or a `bracket` says how a vertex is found."""

    w: Tensor
    m: Tensor
    g: Tensor
    constraint: KSparse | KSupport | NM | LpBall
    weight: float
    rescaled: bool
    length: float
    groups: Groups | None
    bracket: Bracket | None


class Sums(NamedTuple):
    """|m|^2, |w|^2, <w, u>, |u|^2."""

    mm: float
    ww: float
    wu: float
    uu: float


def fits(p: Tensor, g: Tensor, constraint: ConstraintSet) -> bool:
    """Whether a tensor can be stepped this way: float32 or float64 on the CPU, all of it in one layout."""
    same = p.device.type == "cpu" and p.dtype == g.dtype and p.dtype in (torch.float32, torch.float64) and p.stride() == g.stride()
    known = isinstance(constraint, KSparse | KSupport | NM) or (isinstance(constraint, LpBall) and constraint.p == 2)
    return known and same and is_dense(p)


def groups_of(p: Tensor, constraint: ConstraintSet) -> Groups | None:
    """The groups of an N:M set; an L2 ball keeps one of every one. Raises UsageError for a tensor without such groups."""
    if isinstance(constraint, NM):
        check_groups(p, constraint.m)
        return Groups(constraint.n, constraint.m, p.stride(1)) if constraint.n < constraint.m else Groups(1, 1, 1)
    return Groups(1, 1, 1) if isinstance(constraint, LpBall) else None


@np.errstate(over="ignore", invalid="ignore")
def step_(job: Job, memory: Tensor | None) -> float:
    """w and m moved by one step, in place; returns gamma before it is clamped to 1, 0 if nothing moved.

    memory: 1-D, to lay u over (`topk.like`); new memory costs more than the step."""
    shaped = like(job.m, memory)
    sums = _average_and_mark_(job, shaped, job.groups) if job.groups else _average_and_select_(job, shaped)
    w, m, u = (memory_order(x.detach()) for x in (job.w, job.m, shaped))
    norm2, scale, distance2 = _aim(job, sums)
    if not all(_SQUARES[0] < x < _SQUARES[1] for x in (sums.mm, sums.uu)) or not distance2 >= _NEAR * sums.ww:
        norm2, uu = _square(m), _square(u)
        scale = _scale(job, uu)
        distance2 = sum(float((x.double() - (scale * y).double()).square().sum()) for x, y in _parts(w, u))
    if not norm2 or not distance2 or not abs(scale) < torch.finfo(w.dtype).max:
        return 0.0
    gamma = job.length * math.sqrt(norm2 / distance2) if job.rescaled else job.length
    for x, y in _parts(w, u):
        x.lerp_(y.mul_(scale), min(gamma, 1.0))
    return gamma


def _aim(job: Job, sums: Sums) -> tuple[float, float, float]:
    """|m|^2, v / u and |w - v|^2 from the sums."""
    scale = _scale(job, sums.uu)
    return sums.mm, scale, sums.ww - 2 * scale * sums.wu + scale * scale * sums.uu


def _scale(job: Job, uu: float) -> float:
    """v / u; infinite if u is 0."""
    if isinstance(job.constraint, KSparse):
        return -job.constraint.radius
    return -job.constraint.radius / math.sqrt(uu) if uu else -math.inf


def _square(x: Tensor) -> float:
    return sum(float(part.double().square().sum()) for (part,) in _parts(x))


def _average_and_mark_(job: Job, shaped: Tensor, groups: Groups) -> Sums:
    """m averaged, u = m where its group keeps it, else 0."""
    w, m, g, u = (memory_order(x.detach()) for x in (job.w, job.m, job.g, shaped))
    size = max(1, CHUNK // (groups.m * groups.stride)) * groups.m * groups.stride
    kept = np.empty(min(size, m.numel()), bool)
    total = np.zeros(4)
    for x, y, z, v in zip(*(torch.split(part, size) for part in (m, g, w, u)), strict=True):
        average, a, b, marks = x.lerp_(y, job.weight).numpy(), z.numpy(), v.numpy(), kept[: x.numel()]
        if groups.n < groups.m:
            mark_kept_(marks, bits_of(x), *groups)
            np.multiply(average, marks, out=b)
        else:
            np.copyto(b, average)
        total += float(np.dot(average, average)), float(np.dot(a, a)), float(np.dot(a, b)), _square_in_short_sums(b)
    return Sums(*total.tolist())


def _average_and_select_(job: Job, shaped: Tensor) -> Sums:
    """m averaged, u = sign(m) or m on its k largest magnitudes, else 0."""
    assert isinstance(job.constraint, KSparse | KSupport) and job.bracket
    w, m, g, u = (memory_order(x.detach()) for x in (job.w, job.m, job.g, shaped))
    k = min(job.constraint.k, m.numel())
    norm2, found = _average_(m, g, job.weight, k, job.bracket)
    kth, surplus = found or kth_largest(bits_of(m), k)
    job.bracket.saw(kth, m.dtype)
    signs = isinstance(job.constraint, KSparse)
    ww, wu, uu = _direct_(u, w, m, kth, signs)
    if signs:
        uu = float(k + surplus if kth else u.count_nonzero())
    if surplus and kth:
        shaped[last_ties(job.m, kth, surplus)] = 0  # what is left is summed again: taking the ties off the sums would cancel
        wu = sum(float(torch.dot(x.double(), y.double())) for x, y in _parts(w, u))
        uu = float(k) if signs else _square(u)
    return Sums(norm2, ww, wu, uu)


def _average_(m: Tensor, g: Tensor, weight: float, k: int, bracket: Bracket) -> tuple[float, tuple[int, int] | None]:
    """m moved towards g; (|m|^2, the k-th largest and its surplus if the bracket held it)."""
    scan = Scan(*bracket.guess, bits_of(m).dtype) if bracket.guess and m.numel() > PARTITION_UPTO else None
    norm2 = 0.0
    for x, y in _parts(m, g):
        values = x.lerp_(y, weight).numpy()
        norm2 += float(np.dot(values, values))
        if scan:
            scan.add(bits_of(x))
    return norm2, scan.kth_largest(k) if scan else None


def _direct_(u: Tensor, w: Tensor, m: Tensor, kth: int, signs: bool) -> tuple[float, float, float]:
    """u = sign(m) or m where |m| is at least the k-th largest, else 0; (|w|^2, <w, u>, |u|^2), the last 0 for signs."""
    ww = wu = uu = 0.0
    for x, y, z in _parts(u, w, m):
        keep_at_least_(x, z, kth)
        if signs:
            x.sign_()
        a, b = y.numpy(), x.numpy()
        ww, wu, uu = ww + float(np.dot(a, a)), wu + float(np.dot(a, b)), uu + (0.0 if signs else _square_in_short_sums(b))
    return ww, wu, uu


def _square_in_short_sums(u: np.ndarray) -> float:
    """|u|^2, which the vertex's length comes from."""
    return sum(float(np.dot(part, part)) for part in (u[i : i + _SHORT] for i in range(0, u.size, _SHORT)))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].numel() <= CHUNK:
        return iter([tensors])
    return zip(*(torch.split(x, CHUNK) for x in tensors), strict=True)
