"""What a plan will cost before anything is cut, and the plan that meets a cost asked for.

A layer's MACs and weights are proportional to its outputs times its inputs, so the cost of any plan is exact arithmetic
on the dense network's per-layer counts. `meet` searches the sparsity for a share of the dense cost, then moves single
channel blocks until the share is within the tolerance, looks further where that is not enough, or refuses with what can be had."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from prunectl.errors import Unsatisfiable
from prunectl.pruning import cost
from prunectl.pruning.surgery import Dense, Dropped, Graph, PerChannel

Plan = dict[str, list[int]]
TOLERANCE = 0.02
ENUMERATED = 20_000  # plans that are all looked at, about a second, before a budget is refused
STARTS = 12


@dataclass(frozen=True)
class Budget:
    """What was asked for: share `value` of channels removed (metric "channels"), or of dense "macs" or "params" kept.

    whole: what the share is of, where that is not the network at hand but the dense one that it was cut from; gone: the
    channels that went before. tolerance: how far off it may be met, as a share of `value`; grain: the share that one channel is,
    half of which is near enough where channels are asked for."""

    metric: str
    value: float
    whole: int | None = None
    gone: int = 0
    tolerance: float = TOLERANCE
    grain: float = 0.0

    @property
    def keeps(self) -> float:
        return 1 - self.value if self.metric == "channels" else self.value

    @property
    def slack(self) -> float:
        """Absolute tolerance: 2 % of the value asked for, or the nearest whole channel."""
        return max(self.tolerance * self.value, self.grain / 2)

    def refusal(self, nearest: float, smallest: float, finest: float, round_to: int) -> str:
        """nearest: the share that comes nearest; smallest, finest: the least that can be kept, at this multiple and at any width."""
        finer = f" with widths in multiples of {round_to}; try --round-to 1 or auto" if round_to > 1 and self.keeps >= finest else ""
        removes = ", which removes nothing" if nearest >= 1 else ""
        if self.metric == "channels":
            return (
                f"--sparsity {self.value:g} cannot be met within {100 * self.tolerance:g} %: the nearest is {1 - nearest:.3f}{removes},"
                f" and of the channels that may go at most {1 - smallest:.3f}{finer}"
            )
        return (
            f"--target-{self.metric} {self.value:g} cannot be met within {100 * self.tolerance:g} %: the nearest is {nearest:.3f}{removes},"
            f" and the least {smallest:.3f} of the dense {self.metric}{finer}"
        )


@dataclass(frozen=True)
class _Layer:
    macs: int
    weight: int  # entries that shrink with outputs and inputs
    vector: int  # entries that shrink with outputs only: biases, norm scales
    outputs: int
    inputs: int


@dataclass(frozen=True)
class CostModel:
    """Exact parameters and MACs of `model` under any plan, from one forward pass of the dense network."""

    layers: Mapping[str, _Layer]
    fixed_params: int
    touches: Mapping[str, tuple[tuple[str, bool, int], ...]]  # group -> (layer, its outputs?, layer channels a group channel)
    other_macs: int

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, input_shape: tuple[int, int, int]) -> CostModel:
        macs = cost.layer_macs(model, input_shape)
        total = cost.count(model, input_shape)
        layers = {}
        for name, module in model.named_modules():
            if isinstance(module, Dense):
                weight, bias = module.weight, module.bias
                inputs = weight.shape[1] if getattr(module, "groups", 1) == 1 else 0
                layers[name] = _Layer(macs.get(name, 0), weight.numel(), 0 if bias is None else bias.numel(), weight.shape[0], inputs)
            elif isinstance(module, PerChannel):
                vectors = [p.numel() for p in module.parameters(recurse=False)]
                if max(vectors, default=1) > 1:  # a PReLU with one slope for all channels keeps it
                    layers[name] = _Layer(0, 0, sum(vectors), vectors[0], 0)
        counted = sum(layer.weight + layer.vector for layer in layers.values())
        touches = {
            g.name: tuple(
                (m.layer, m.out or layers[m.layer].inputs == 0, len(m.index) // g.channels) for m in g.members if m.layer in layers
            )
            for g in graph.groups
        }
        return cls(layers, total.params - counted, touches, total.macs - sum(layer.macs for layer in layers.values()))

    def predict(self, dropped: Mapping[str, int]) -> cost.Cost:
        """Cost when group -> number of channels go."""
        out_gone: dict[str, int] = dict.fromkeys(self.layers, 0)
        in_gone: dict[str, int] = dict.fromkeys(self.layers, 0)
        for group, n in dropped.items():
            for member, is_out, times in self.touches[group]:
                (out_gone if is_out else in_gone)[member] += n * times
        params, macs = self.fixed_params, self.other_macs
        for name, layer in self.layers.items():
            out = layer.outputs - out_gone[name]
            share_in = (layer.inputs - in_gone[name]) / layer.inputs if layer.inputs else 1.0
            macs += round(layer.macs * out / layer.outputs * share_in)
            params += round((layer.weight * share_in + layer.vector) * out / layer.outputs)
        return cost.Cost(params, macs)


def meet(
    allocate: Callable[[float, int], Plan],
    order: Mapping[str, list[int]],
    share: Callable[[Mapping[str, int]], float],
    *,
    budget: Budget,
    rounds: tuple[int, ...],
    floors: Mapping[str, int],
) -> tuple[Plan, int]:
    """A plan that meets `budget` within 2 %, and the multiple its widths were rounded to.

    allocate(sparsity, round_to) gives a plan; order: group -> all its channels, lowest score first; share: group ->
    number dropped -> the share of the budget's quantity that stays, falling as more goes; rounds: multiples to try,
    coarsest first; floors: group -> channels it keeps at least. Raises Unsatisfiable with the range."""
    target, nearest = budget.keeps, 1.0
    for round_to in rounds:
        low, high = 0.0, 1.0  # share is non-increasing in the sparsity
        for _ in range(24):
            middle = (low + high) / 2
            if share(_sizes(allocate(middle, round_to))) > target:
                low = middle
            else:
                high = middle
        plan = min((_sizes(allocate(s, round_to)) for s in (high, low)), key=lambda p: abs(share(p) - target))
        refine = partial(_refine, order=order, share=share, budget=budget, step=round_to, floors=floors)
        plan = refine(plan)
        if abs(share(plan) - target) > budget.slack:
            widths = {g: _numbers(len(order[g]), round_to, floors[g]) for g in plan}
            plan = _sought(plan, widths, share, budget, refine)
        if abs(share(plan) - target) <= budget.slack and any(plan.values()):
            return {g: sorted(order[g][:n]) for g, n in plan.items()}, round_to
        nearest = min(nearest, share(plan), key=lambda s: abs(s - target))
    smallest, finest = (share(_sizes(allocate(1.0, multiple))) for multiple in (rounds[-1], 1))
    raise Unsatisfiable(budget.refusal(nearest, smallest, finest, rounds[-1]))


def _sought(
    plan: dict[str, int],
    widths: Mapping[str, list[int]],
    share: Callable[[Mapping[str, int]], float],
    budget: Budget,
    refine: Callable[[dict[str, int]], dict[str, int]],
) -> dict[str, int]:
    """Where moves from `plan` do not meet the budget: of all widths the nearest plan that does, or, where these are too many,
    what moves from plans around it come to. Else the plan whose share is nearest. widths: group -> ascending numbers that may go."""

    def error(p: Mapping[str, int]) -> float:
        return abs(share(p) - budget.keeps)

    if share({g: numbers[-1] for g, numbers in widths.items()}) > budget.keeps + budget.slack:
        return plan
    if math.prod(map(len, widths.values())) <= ENUMERATED:
        every = (dict(zip(widths, numbers, strict=True)) for numbers in itertools.product(*widths.values()))
        return min(every, key=lambda p: (max(error(p), budget.slack), sum(abs(p[g] - plan[g]) for g in p)))
    draw, best = random.Random(0), plan
    for _ in range(STARTS):
        near = {g: w[min(max(w.index(plan[g]) + draw.randint(-2, 2), 0), len(w) - 1)] for g, w in widths.items()}
        best = min(best, refine(near), key=error)
        if error(best) <= budget.slack:
            break
    return best


def _refine(
    plan: dict[str, int],
    order: Mapping[str, list[int]],
    share: Callable[[Mapping[str, int]], float],
    budget: Budget,
    step: int,
    floors: Mapping[str, int],
) -> dict[str, int]:
    """Greedy moves of one group to its next width, or of two where that is not enough, until none comes nearer."""

    def error(p: dict[str, int]) -> float:
        return abs(share(p) - budget.keeps)

    def moves(p: dict[str, int]) -> list[dict[str, int]]:
        return [{**p, g: n} for g in p for n in _neighbours(p[g], len(order[g]), step, floors[g])]

    while error(plan) > budget.slack / 4:
        near = moves(plan)
        best = min(near, key=error, default=plan)
        if error(best) >= error(plan) > budget.slack and any(_nearer(share(p), share(plan), budget.keeps) for p in near):
            best = min((further for p in near for further in moves(p)), key=error, default=plan)
        if error(best) >= error(plan):
            return plan
        plan = best
    return plan


def _nearer(after: float, before: float, target: float) -> bool:
    """Whether a move goes towards the target, perhaps beyond it; where none does, every group stands at its end."""
    return (after - before) * (target - before) > 0


def _neighbours(gone: int, channels: int, step: int, floor: int) -> list[int]:
    """The numbers of dropped channels next to `gone` that leave a multiple of `step`, or all channels."""
    numbers = _numbers(channels, step, floor)
    return [*[n for n in numbers if n > gone][:1], *[n for n in numbers if n < gone][-1:]]


def _numbers(channels: int, step: int, floor: int) -> list[int]:
    """Ascending numbers of channels that may go: none, or what leaves a multiple of `step` of them."""
    return [0, *(channels - width for width in range((channels - 1) // step * step, floor - 1, -step))]


def _sizes(plan: Dropped) -> dict[str, int]:
    return {group: len(channels) for group, channels in plan.items()}
