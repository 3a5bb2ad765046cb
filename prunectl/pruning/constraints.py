"""Convex sets a tensor may be trained in, each with the linear minimisation oracle (LMO) that Frank-Wolfe needs.

A set is a frozen record of plain numbers, symmetric about 0 and proportional to its `radius`; tensors of any shape come in
and go out with dtype, device and memory format kept. `lmo(g)` returns argmin of <v, g> over the set, ties broken by the
lowest row-major index, 0 where g is 0, written over `memory` (1-D) where that helps; `diameter` is the L2 one; `gauge(x)` is
the factor by which the set must grow to reach x (<= 1 inside); `shrink(x)` is the point x / gauge(x) if x lies outside. No set
ever looks at a model or keeps state.

K-sparse polytope and L2 diameters: Pokutta, Spiegel, Zimmer, arXiv 2010.07243; k-support and group-k-support norm balls:
Zimmer, Spiegel, Pokutta, arXiv 2205.11921, after Argyriou, Foygel, Srebro, NeurIPS 2012."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning.nm import MOST_CHANNELS, channel_groups, nm_mask, nm_qualifies
from prunectl.pruning.topk import like, top_k
from prunectl.registry import Registry

constraints = Registry("constraint", "pruning/constraints.py")


class ConstraintSet(Protocol):
    """What the optimizer, the initialisation and checkpoints ask of a set."""

    kind: ClassVar[str]

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor: ...
    def diameter(self, shape: torch.Size) -> float: ...
    def gauge(self, x: Tensor) -> Tensor: ...
    def shrink(self, x: Tensor) -> Tensor: ...
    def to_dict(self) -> dict[str, Any]: ...


def from_dict(data: Mapping[str, Any]) -> ConstraintSet:
    """The set that `to_dict` described. Raises UnknownName for a kind nobody registered."""
    fields = dict(data)
    return cast(ConstraintSet, constraints.get(fields.pop("kind"))(**fields))


def _to_dict(self: Any) -> dict[str, Any]:
    """Plain numbers and the name of the kind, for checkpoints."""
    return {"kind": self.kind, **asdict(self)}


def _shrink(self: ConstraintSet, x: Tensor) -> Tensor:
    """x if it lies in the set, else the point of the set's boundary on the segment from 0 to x (one rounding inside)."""
    gauge = self.gauge(x)
    scale = torch.where(gauge > 1, gauge * (1 + torch.finfo(x.dtype).eps), torch.ones_like(gauge))
    return (x / scale).to(x.dtype)


def _require(holds: bool, kind: str, what: str, expected: str) -> None:
    if not holds:
        raise UsageError(f"constraint {kind}: {what}, expected {expected}.")


def _plain(record: Any) -> None:
    """Fields given as NumPy scalars or 0-d tensors become the plain numbers that checkpoints keep. Raises UsageError."""
    for name, value in vars(record).items():
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        _require(isinstance(number, int | float), record.kind, f"{name} = {value!r}", "a number")
        object.__setattr__(record, name, number)


def _require_radius(kind: str, radius: float) -> None:
    _require(math.isfinite(radius) and radius > 0, kind, f"radius = {radius}", "a finite number above 0")


def _require_count(kind: str, name: str, count: int) -> None:
    _require(isinstance(count, int) and count >= 1, kind, f"{name} = {count}", "an integer of at least 1")


@constraints.register
@dataclass(frozen=True)
class KSparse:
    """K-sparse polytope: at most K large entries, each at most the radius (Lu et al.).

    conv{v in {0, +-radius}^n with k non-zeros} = {|x|_1 <= k radius, |x|_inf <= radius}; k above n counts as n."""

    kind: ClassVar[str] = "k-sparse"
    k: int
    radius: float

    def __post_init__(self) -> None:
        _plain(self)
        _require_count(self.kind, "k", self.k)
        _require_radius(self.kind, self.radius)

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        return top_k(g, self.k, memory=memory).sign_().mul_(-self.radius)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * math.sqrt(min(self.k, shape.numel()))

    def gauge(self, x: Tensor) -> Tensor:
        magnitude = x.abs().double()
        return torch.maximum(magnitude.max(), magnitude.sum() / min(self.k, x.numel())) / self.radius

    shrink = _shrink
    to_dict = _to_dict


@constraints.register
@dataclass(frozen=True)
class KSupport:
    """k-support norm ball: vertices are unit directions of at most K entries (Zimmer et al.).

    conv{|v|_0 <= k, |v|_2 <= radius}."""

    kind: ClassVar[str] = "k-support"
    k: int
    radius: float

    def __post_init__(self) -> None:
        _plain(self)
        _require_count(self.kind, "k", self.k)
        _require_radius(self.kind, self.radius)

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        return _onto_sphere_(top_k(g, self.k, memory=memory), self.radius)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def gauge(self, x: Tensor) -> Tensor:
        return _k_support_norm(x.flatten(), self.k) / self.radius

    shrink = _shrink
    to_dict = _to_dict


@constraints.register
@dataclass(frozen=True)
class GroupKSupport:
    """k-support norm ball over filters: vertices have at most K non-zero filters, which can then be removed.

    conv{at most k filters x[c] non-zero, |v|_2 <= radius}; a filter is one index of dimension 0."""

    kind: ClassVar[str] = "group-k-support"
    k: int
    radius: float

    def __post_init__(self) -> None:
        _plain(self)
        _require_count(self.kind, "k", self.k)
        _require_radius(self.kind, self.radius)

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        kept = top_k(filter_norms(g), self.k) != 0
        return _onto_sphere_(_mul(g, kept.view(-1, *[1] * (g.dim() - 1)), memory), self.radius)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def gauge(self, x: Tensor) -> Tensor:
        return _k_support_norm(filter_norms(x.double()), self.k) / self.radius

    shrink = _shrink
    to_dict = _to_dict


@constraints.register
@dataclass(frozen=True)
class NM:
    """N:M ball: vertices keep N entries of every M consecutive input channels, as 2:4 sparse hardware wants.

    conv{every group of m channels at one (out, y, x) has at most n non-zeros, |v|_2 <= radius}; dimension 1 divides by m."""

    kind: ClassVar[str] = "nm"
    n: int
    m: int
    radius: float

    def __post_init__(self) -> None:
        _plain(self)
        _require_count(self.kind, "n", self.n)
        _require_count(self.kind, "m", self.m)
        _require(self.m <= MOST_CHANNELS, self.kind, f"m = {self.m}", f"at most {MOST_CHANNELS}")
        _require(self.n <= self.m, self.kind, f"n = {self.n} of m = {self.m}", "n at most m")
        _require_radius(self.kind, self.radius)

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        return _onto_sphere_(_mul(g, nm_mask(g, self.n, self.m), memory), self.radius)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def gauge(self, x: Tensor) -> Tensor:
        groups = channel_groups(x, self.m).movedim(2, -1)
        return _norm(_k_support_norm(groups, self.n)) / self.radius

    shrink = _shrink
    to_dict = _to_dict


@constraints.register(name="lp")
@dataclass(frozen=True)
class LpBall:
    """Lp norm ball, 1 <= p <= inf; p = 2 is the plain L2 ball."""

    kind: ClassVar[str] = "lp"
    p: float
    radius: float

    def __post_init__(self) -> None:
        _plain(self)
        _require(self.p >= 1, self.kind, f"p = {self.p}", "a number from 1 to inf")
        _require_radius(self.kind, self.radius)

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        if self.p == 1:
            return top_k(g, 1, memory=memory).sign_().mul_(-self.radius)
        if self.p == 2:
            return _onto_sphere_(_mul(g, g.new_ones(()), memory), self.radius)
        if self.p == math.inf:
            return g.sign().mul_(-self.radius)
        dual = self.p / (self.p - 1)
        direction = g / g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)  # so that no power overflows
        direction = direction.sign() * direction.abs().pow(dual - 1)
        return direction.mul_(-self.radius / _norm(direction, self.p).clamp_min(torch.finfo(g.dtype).tiny))

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * max(1.0, math.pow(shape.numel(), 0.5 - 1 / self.p))

    def gauge(self, x: Tensor) -> Tensor:
        return _norm(x.double(), self.p) / self.radius

    shrink = _shrink
    to_dict = _to_dict


@constraints.register(name="none")
@dataclass(frozen=True)
class Unconstrained:
    """No constraint: `sfw-prune` trains by plain SGD, the rival; `SFW` itself by SGD with averaged momentum. Only here weights decay."""

    kind: ClassVar[str] = "none"

    def lmo(self, g: Tensor, *, memory: Tensor | None = None) -> Tensor:
        raise UsageError("constraint none: an unbounded set has no LMO; ask a bounded one.")

    def diameter(self, shape: torch.Size) -> float:
        return math.inf

    def gauge(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=x.device)

    def shrink(self, x: Tensor) -> Tensor:
        return x

    to_dict = _to_dict


def filter_norms(x: Tensor) -> Tensor:
    """(C,) float64 L2 norms of the C filters x[c], of x (C, ...)."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=torch.float64) if x.dim() > 1 else x.abs().double()
    return norms


def _onto_sphere_(x: Tensor, radius: float) -> Tensor:
    """-radius x / |x|, or 0 if x is 0."""
    norm = _norm(x)
    return x.mul_(torch.where(norm > 0, -radius / norm, 0))


def _mul(g: Tensor, mask: Tensor, memory: Tensor | None) -> Tensor:
    return torch.mul(g, mask) if memory is None else torch.mul(g, mask, out=like(g, memory))


def _norm(x: Tensor, p: float = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, dtype=torch.float64)  # squares of 1e19 and of 1e-23 leave float32
    return norm


def _k_support_norm(x: Tensor, k: int) -> Tensor:
    """k-support norm along the last dimension, in float64.

    With |x| sorted descending and |x|_(0) = inf, t is the one in 0..k-1 with |x|_(k-t-1) > A / (t+1) >= |x|_(k-t), A the sum
    of |x|_(i) over i >= k-t; the squared norm is the sum of x_(i)^2 over i < k-t, plus A^2 / (t+1) (Argyriou et al., Prop. 2.1)."""
    k = min(k, x.shape[-1])
    magnitude = x.abs().double()
    head = torch.topk(magnitude, k).values
    rest = (magnitude.sum(-1, keepdim=True) - head.sum(-1, keepdim=True)).clamp_min(0)
    t = torch.arange(k, device=x.device)
    tail = head.flip(-1).cumsum(-1) + rest  # A for t = 0..k-1
    average = tail / (t + 1)
    before = torch.cat([head.flip(-1)[..., 1:], torch.full_like(head[..., :1], math.inf)], -1)  # |x|_(k-t-1)
    chosen = (before <= average).sum(-1, keepdim=True)  # the condition holds from one t on, and the first is the answer
    flat = tail.gather(-1, chosen).squeeze(-1) ** 2 / (chosen.squeeze(-1) + 1)
    return torch.sqrt(flat + torch.where(t < k - 1 - chosen, head**2, 0).sum(-1))


@dataclass(frozen=True)
class ConstraintPlan:
    """One set per parameter name, and the weights that stay on an L2 ball because the asked kind does not fit them."""

    sets: dict[str, ConstraintSet]
    on_l2_ball: tuple[str, ...] = ()


# Filters and entries are counted differently, so each kind has its own default share.
DEFAULT_K_FRACTION = {"k-sparse": 0.05, "k-support": 0.05, "group-k-support": 0.25}


def sets_for(
    named_parameters: Iterable[tuple[str, Tensor]],
    kind: str,
    *,
    tau: float = 15.0,
    k_fraction: float | None = None,
    n: int = 2,
    m: int = 4,
    p: float = 2.0,
) -> ConstraintPlan:
    """A set of one kind for every parameter, of L2 diameter D = 2 tau |w|, w as it is now (|w| = 0 counts as 1).

    Lu et al., ICLR 2022, Sec. 4 and App.; K = min(max(10, floor(k_fraction n)), n) entries, or max(1, round(k_fraction C))
    filters. Differs: their norms are averages over re-initialisations, keyed by shape; these are each tensor's own.
    For group-k-support tensors of fewer than three dimensions, for nm those without groups of m input channels, go on L2 balls
    of the same diameter. Raises UsageError for tau, k_fraction, n, m or p out of range, Unsatisfiable if nothing fits."""
    kind = constraints.check(kind)
    if not (math.isfinite(tau) and tau > 0):
        raise UsageError(f"tau = {tau}: must be a finite number above 0, e.g. 15.")
    share = DEFAULT_K_FRACTION.get(kind, 1.0) if k_fraction is None else k_fraction
    if not 0 < share <= 1:
        raise UsageError(f"k_fraction = {share}: must be in (0, 1], e.g. 0.05.")
    if kind == "nm":
        NM(n, m, radius=1.0)  # refuse an impossible pattern before any tensor is looked at
    parameters = list(named_parameters)
    sets = {name: _set_of(w, kind, 2 * tau * (float(w.detach().norm()) or 1.0), share, (n, m), p) for name, w in parameters}
    misfits = tuple(name for name, w in parameters if w.dim() >= 2 and sets[name].kind != kind)
    if not any(c.kind == kind for c in sets.values()):
        needs = f"input channels divisible by {m}" if kind == "nm" else "convolution filters"
        raise Unsatisfiable(f"constraint {kind}: no layer has {needs}; choose another constraint or another model.")
    return ConstraintPlan(sets, misfits)


def _set_of(w: Tensor, kind: str, diameter: float, share: float, pattern: tuple[int, int], p: float) -> ConstraintSet:
    size = w.numel()
    if kind == "none":
        return Unconstrained()
    if kind == "k-sparse":
        k = _k_entries(size, share)
        return KSparse(k, radius=diameter / (2 * math.sqrt(k)))
    if kind == "k-support":
        return KSupport(_k_entries(size, share), radius=diameter / 2)
    if kind == "group-k-support" and w.dim() >= 3:
        return GroupKSupport(max(1, round(share * w.shape[0])), radius=diameter / 2)
    if kind == "nm" and nm_qualifies(w.shape, pattern[1]):
        return NM(*pattern, radius=diameter / 2)
    if kind == "lp":
        return LpBall(p, radius=diameter / LpBall(p, radius=1.0).diameter(w.shape))
    return LpBall(2.0, radius=diameter / 2)


def _k_entries(size: int, share: float) -> int:
    return min(max(10, math.floor(share * size)), size)
