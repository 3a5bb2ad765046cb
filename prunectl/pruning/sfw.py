"""Stochastic Frank-Wolfe: training inside convex sets, so that what pruning removes has already become small.

Algorithm 1 of Lu et al., ICLR 2022 (after Pokutta, Spiegel, Zimmer, arXiv 2010.07243), per tensor w with gradient g:

    m = g at the first step, then m = rho m + (1 - rho) g
    v = LMO(m)                                    a vertex of the set, the one farthest downhill
    gamma = min(lr |m| / |w - v|, 1)              rescale "gradient": SGD's step length in Frank-Wolfe's direction
            min(lr / D, 1) or min(lr, 1)          rescale "diameter", "none"
    w = (1 - gamma) w + gamma v

A convex combination never leaves the set, so a feasible start stays feasible, up to the rounding of the tensor's format.
`frank_wolfe_step` is the pure function, `SFW` the optimizer over it. Invariant: a step whose gradients hold a NaN or an
infinity changes nothing but a counter. On devices other than the CPU nothing is ever read back, so a step never stalls the queue."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from prunectl.errors import UsageError
from prunectl.pruning import sfw_kernel, sfw_stream
from prunectl.pruning.constraints import NM, ConstraintSet, GroupKSupport, Unconstrained, from_dict
from prunectl.pruning.nm import nm_qualifies
from prunectl.pruning.topk import Bracket, is_dense, memory_order

Rescale = Literal["gradient", "diameter", "none"]
Kernel = Literal["none", "compiled"]
_RESCALES, _KERNELS = get_args(Rescale), get_args(Kernel)

_CHUNK = 1 << 18  # entries of a temporary difference
_STACK_UPTO = 1 << 16  # entries; smaller tensors of one shape are stacked and stepped by one set of kernels


def frank_wolfe_step(w: Tensor, m: Tensor, constraint: ConstraintSet, *, lr: float, rescale: Rescale = "gradient") -> tuple[Tensor, Tensor]:
    """(w moved towards the constraint's vertex for the direction m, the share gamma of the way it went, 0-d).

    w is unchanged where m is all zero. Differentiable in w and m, the vertex taken as constant."""
    v = constraint.lmo(m.detach())
    gamma = _guarded_gamma(_norm(m), _norm(w - v), lr, rescale, constraint.diameter(w.shape)).clamp(max=1)
    return torch.lerp(w, v, gamma.to(w.dtype)), gamma


def frank_wolfe_gap(w: Tensor, m: Tensor, constraint: ConstraintSet) -> Tensor:
    """<m, w - LMO(m)>, 0-d float64: never negative for feasible w, 0 exactly where w is stationary in the set for m.

    For an unbounded set it is |m|."""
    if isinstance(constraint, Unconstrained):
        return _norm(m).double()
    return _inner(m, w - constraint.lmo(m))


def _gamma(norm: Any, distance: Any, lr: float, rescale: Rescale, diameter: Any) -> Any:
    """Unclamped gamma for a direction of length `norm` and a vertex `distance` away, neither 0; floats or 0-d tensors."""
    if rescale == "gradient":
        return lr * norm / distance
    return lr / diameter if rescale == "diameter" else lr


def _guarded_gamma(norm: Tensor, distance: Tensor, lr: float, rescale: Rescale, diameter: float | Tensor) -> Tensor:
    """Unclamped gamma, 0-d, and 0 for a zero direction and at the vertex itself; nothing is read back."""
    moves = (norm > 0) & (distance > 0)
    return torch.where(moves, torch.ones_like(norm) * _gamma(norm, torch.where(moves, distance, 1), lr, rescale, diameter), 0)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=_precise(x))
    return norm


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.sum(a * b, dtype=torch.float64)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, 0-d; of tensors laid out alike the difference is never held as a whole."""
    if a.numel() <= _CHUNK or a.stride() != b.stride() or not is_dense(a):
        return _norm(a - b)
    pairs = zip(torch.split(memory_order(a), _CHUNK), torch.split(memory_order(b), _CHUNK), strict=True)
    return _norm(torch.stack([_norm(x - y) for x, y in pairs]))


@dataclass(frozen=True)
class SFWStatistics:
    """Where a run stands; 0-d tensors on the parameters' device, so that reading them is the only wait.

    gap: <m, w - LMO(m)> summed over the constrained tensors, m the averaged gradient; 0 at a stationary point.
    active_fraction: share of their entries on which the current vertices are not zero.
    clamped: how often so far a tensor's step was cut at its vertex (gamma = 1).
    screened: how many steps so far were skipped for a NaN or an infinity in the gradients."""

    gap: Tensor
    active_fraction: Tensor
    clamped: Tensor
    screened: Tensor


class SFW(Optimizer):
    """Stochastic Frank-Wolfe with momentum; a param group's `constraint` holds for each of its tensors by itself.

        SFW([{"params": [p], "constraint": KSparse(k=K, radius=tau)}, ...], lr=1.0, momentum=0.9)

    With `Unconstrained()` it is `torch.optim.SGD(lr, momentum=rho, dampening=rho)`, weight decay included, which no other set
    accepts. Parameters start feasible after `feasible_()`. `kernel="compiled"` steps contiguous float32 tensors on K-sparse,
    k-support, N:M and L2 sets in C (sfw_kernel.py: CPU only, needs a C compiler, equal but for rounding). `state_dict` holds tensors and
    plain numbers only. Raises UsageError for values out of range, at construction and at the step if a scheduler put them there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        rescale: Rescale = "gradient",
        weight_decay: float = 0.0,
        constraint: ConstraintSet | None = None,
        kernel: Kernel = "none",
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "rescale": rescale, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "constraint": constraint, "kernel": kernel})
        self._brackets: dict[Tensor, Bracket] = {}
        counts = {name: torch.zeros((), dtype=torch.int64, device=self._device) for name in ("clamped", "screened")}
        cast(dict[str, Any], self.state)["counts"] = counts  # a name among the tensors: checkpoints keep it as it is

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._brackets = {}

    @property
    def _device(self) -> torch.device:
        first = next((p for group in self.param_groups for p in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def _reads_back(self) -> bool:
        """Whether looking at a value costs nothing; elsewhere it would stall the queue."""
        return self._device.type == "cpu"

    @property
    def _counts(self) -> dict[str, Tensor]:
        return cast(dict[str, dict[str, Tensor]], self.state)["counts"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_new(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    def _check_new(self, group: dict[str, Any]) -> None:
        _check_group(group)
        if group["kernel"] == "compiled":
            sfw_kernel.library()  # a machine without a compiler says so now
        constraint = group["constraint"]
        for p in group["params"]:
            if p.device != self._device:
                raise UsageError(f"SFW: parameters on {self._device} and {p.device}; move them to one device first.")
            if not is_dense(p):
                raise UsageError(f"SFW: a parameter of shape {tuple(p.shape)} is a slice or an expanded view; pass a tensor of its own.")
            if not p.is_floating_point():
                raise UsageError(f"SFW: a parameter of {p.dtype}; only real floating-point tensors lie in these sets.")
            if isinstance(constraint, NM) and not nm_qualifies(p.shape, constraint.m):
                shape = f"shape {tuple(p.shape)} has no input channels in groups of {constraint.m}"
                raise UsageError(f"SFW: a parameter of {shape}; give it a set of its own, e.g. LpBall(2, radius).")
            if isinstance(constraint, GroupKSupport) and not p.dim():
                raise UsageError("SFW: a parameter without dimensions has no filters; give it a set of its own, e.g. LpBall(2, radius).")

    @torch.no_grad()
    def feasible_(self) -> None:
        """Every trainable parameter lies in its set: one outside is shrunk onto the boundary by the exact gauge."""
        for p, group in self._parameters():
            if p.requires_grad:
                p.copy_(group["constraint"].shrink(p))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Every parameter that has a gradient moved by one step; none of them, if any gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)
        moving = [(p, group) for p, group in self._parameters() if p.grad is not None]
        if any(p.grad.is_sparse for p, _ in moving if p.grad is not None):
            raise UsageError("SFW: a sparse gradient; its steps touch every entry, so build the embedding with sparse=False.")
        if not moving:
            return loss
        finite = _all_finite([p.grad for p, _ in moving if p.grad is not None])
        self._counts["screened"] += ~finite
        if not self._reads_back:
            self._step_without_sync(moving, finite)
        elif finite:
            self._step_on_cpu(moving)
        return loss

    @torch.no_grad()
    def statistics(self) -> SFWStatistics:
        """Gap and active fraction at the present weights, and the counters; costs an LMO per tensor, so ask once an epoch."""
        gap = torch.zeros((), dtype=torch.float64, device=self._device)
        active, entries = torch.zeros((), dtype=torch.int64, device=self._device), 0
        for p, group in self._parameters():
            if p not in self.state or isinstance(group["constraint"], Unconstrained):
                continue
            m = self.state[p]["momentum_buffer"]
            v = group["constraint"].lmo(m)
            gap += _inner(m, p - v)
            active += v.count_nonzero()
            entries += p.numel()
        return SFWStatistics(gap, active / max(entries, 1), self._counts["clamped"].clone(), self._counts["screened"].clone())

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        packed["param_groups"] = [{**group, "constraint": group["constraint"].to_dict()} for group in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if any("constraint" not in group for group in state_dict["param_groups"]):
            raise UsageError("SFW: this state is another optimizer's, its groups have no constraint; load what SFW.state_dict() gave.")
        groups = [{**group, "constraint": from_dict(group["constraint"])} for group in state_dict["param_groups"]]
        super().load_state_dict({"state": copy.deepcopy(state_dict["state"]), "param_groups": groups})  # no buffer shared with the source
        for name, count in self._counts.items():
            self._counts[name] = count.to(self._device)

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"] if p.numel())

    def _momentum(self, p: Tensor) -> Tensor:
        """The averaged gradient, laid out in memory like p; `started` says whether it has taken a gradient in yet."""
        state = self.state[p]
        if not state:
            state["started"] = torch.zeros((), device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        elif state["momentum_buffer"].stride() != p.stride():
            state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _step_on_cpu(self, moving: list[tuple[Tensor, dict[str, Any]]]) -> None:
        gammas, compiled = [], []
        for p, group in moving:
            m, g, constraint = self._momentum(p), _gradient(p, group), group["constraint"]
            weight = 1 - group["momentum"] if self.state[p]["started"] else 1.0
            if weight == 1:
                self.state[p]["started"].fill_(1)
            if isinstance(constraint, Unconstrained):
                p.add_(m.lerp_(g, weight), alpha=-group["lr"])
            elif sfw_stream.fits(p, g, constraint):
                length = group["lr"] / constraint.diameter(p.shape) if group["rescale"] == "diameter" else group["lr"]
                groups = sfw_stream.groups_of(p, constraint)
                bracket = None if groups else self._brackets.setdefault(p, Bracket())
                job = sfw_stream.Job(p, m, g, constraint, weight, group["rescale"] == "gradient", length, groups, bracket)
                if group["kernel"] == "compiled" and sfw_kernel.fits(job):
                    compiled.append(job)
                else:
                    gammas.append(sfw_stream.step_(job, self._memory))
            else:
                m.lerp_(g, weight)
                v = constraint.lmo(m, memory=self._memory)
                norm, distance = _norm(m).item(), _distance(p, v).item()
                if norm and distance:
                    gammas.append(_gamma(norm, distance, group["lr"], group["rescale"], constraint.diameter(p.shape)))
                    p.lerp_(v, min(gammas[-1], 1.0))
        self._counts["clamped"] += sum(gamma > 1 for gamma in gammas) + (sfw_kernel.run_(compiled) if compiled else 0)

    @functools.cached_property
    def _memory(self) -> Tensor:
        """Room for the largest tensor's vertex, kept: new memory for every vertex would cost more than the vertex."""
        largest = max((p for p, _ in self._parameters()), key=lambda p: p.numel())
        return torch.empty(largest.numel(), dtype=largest.dtype)

    def _step_without_sync(self, moving: list[tuple[Tensor, dict[str, Any]]], finite: Tensor) -> None:
        """The same step with nothing read back: what must not happen is multiplied away, small tensors of one shape go at once."""
        stacks: defaultdict[Any, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for p, group in moving:
            options = _Options(_unit(group["constraint"]), group["lr"], group["momentum"], group["rescale"])
            stacks[options, p.shape, p.dtype, p.numel() <= _STACK_UPTO or id(p)].append((p, group))
        for (options, *_), members in stacks.items():
            columns = [
                [p for p, _ in members],
                [self._momentum(p) for p, _ in members],
                [_gradient(p, group) for p, group in members],
                [self.state[p]["started"] for p, _ in members],
                [torch.full((), getattr(group["constraint"], "radius", 1.0), dtype=_precise(p), device=p.device) for p, group in members],
            ]
            advance = functools.partial(_advance_, finite=finite, options=options)
            if len(members) == 1:
                clamped = advance(*(column[0] for column in columns))
            else:
                stacked = [torch.stack(column) for column in columns]
                clamped = torch.func.vmap(advance)(*stacked)
                for column, values in zip(columns[:2], stacked[:2], strict=True):
                    torch._foreach_copy_(column, list(values.unbind()))
            torch._foreach_maximum_(columns[3], [finite.to(started.dtype) for started in columns[3]])
            self._counts["clamped"] += clamped.sum()


class _Options(NamedTuple):
    """What tensors must share to be stepped together: the set at radius 1, and the group's settings."""

    unit: ConstraintSet
    lr: float
    momentum: float
    rescale: Rescale


def _unit(constraint: ConstraintSet) -> ConstraintSet:
    """The set at radius 1: v(radius) = radius v(1), so tensors whose sets differ in radius alone can share kernels."""
    return constraint if isinstance(constraint, Unconstrained) else replace(constraint, radius=1.0)  # type: ignore[type-var]


def _advance_(w: Tensor, m: Tensor, g: Tensor, started: Tensor, radius: Tensor, *, finite: Tensor, options: _Options) -> Tensor:
    """w and m after one step, in place, unchanged if not `finite`; the result says whether the step was clamped."""
    weight = torch.where(started > 0, torch.full_like(started, 1 - options.momentum, dtype=m.dtype), 1)
    m.copy_(torch.lerp(m, torch.where(finite, g, m), weight))
    if isinstance(options.unit, Unconstrained):
        w.sub_(torch.where(finite, m, 0), alpha=options.lr)
        return torch.zeros_like(finite)
    v = options.unit.lmo(m) * radius.to(m.dtype)
    diameter = options.unit.diameter(w.shape) * radius
    gamma = finite * _guarded_gamma(_norm(m), _distance(w, v), options.lr, options.rescale, diameter)
    w.copy_(torch.lerp(w, v, gamma.clamp(max=1).to(w.dtype)))
    return gamma > 1


def _precise(x: Tensor) -> torch.dtype:
    """What norms and scales of x are computed in."""
    return torch.float32 if x.itemsize < 4 else x.dtype


def _gradient(p: Tensor, group: dict[str, Any]) -> Tensor:
    assert p.grad is not None
    return p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad.resolve_neg()


def _all_finite(gradients: list[Tensor]) -> Tensor:
    """0-d bool, on the gradients' device."""
    if gradients[0].device.type != "cpu":
        return torch.isfinite(torch.nn.utils.get_total_norm(gradients, math.inf))
    if math.isfinite(sum(float(g.sum(dtype=torch.float32 if g.itemsize < 4 else None)) for g in gradients)):
        return torch.tensor(True)
    return torch.stack([torch.isfinite(g).all() for g in gradients]).all()  # a finite sum may overflow: look closer


def _check_group(group: dict[str, Any]) -> None:
    constraint, lr, momentum, rescale = group["constraint"], group["lr"], group["momentum"], group["rescale"]
    if constraint is None:
        raise UsageError("SFW: a param group has no constraint; give it one, e.g. {'params': ps, 'constraint': KSparse(k, radius)}.")
    if not hasattr(constraint, "lmo"):
        raise UsageError(f"SFW: constraint = {constraint!r}: expected a set, e.g. KSparse(k, radius).")
    for name in ("lr", "momentum", "weight_decay"):
        if isinstance(group[name], str) or not math.isfinite(group[name]):
            raise UsageError(f"SFW: {name} = {group[name]!r}: must be a finite number.")
    if lr < 0:
        raise UsageError(f"SFW: lr = {lr}: must be at least 0.")
    if not 0 <= momentum < 1:
        raise UsageError(f"SFW: momentum = {momentum}: must be in [0, 1), e.g. 0.9.")
    if rescale not in _RESCALES:
        raise UsageError(f"SFW: rescale = {rescale!r}: must be one of {', '.join(_RESCALES)}.")
    if group["kernel"] not in _KERNELS:
        raise UsageError(f"SFW: kernel = {group['kernel']!r}: must be one of {', '.join(_KERNELS)}.")
    bounded = not isinstance(constraint, Unconstrained)
    if bounded and rescale == "none" and lr > 1:
        raise UsageError(f"SFW: lr = {lr} with rescale = none would step past the vertex; use at most 1, or rescale = gradient.")
    if bounded and group["weight_decay"]:
        raise UsageError(f"SFW: weight_decay = {group['weight_decay']} inside a constraint; only constraint none takes weight decay.")
    if group["weight_decay"] < 0:
        raise UsageError(f"SFW: weight_decay = {group['weight_decay']}: must be at least 0.")
