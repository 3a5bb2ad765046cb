"""Which channels a network loses to meet a budget: criterion, scope, floors and rounding put together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prunectl.errors import Unsatisfiable, VerificationFailed
from prunectl.pruning import allocate
from prunectl.pruning.budget import Budget, CostModel, meet
from prunectl.pruning.channels import describe
from prunectl.pruning.cost import Cost, count
from prunectl.pruning.criteria import criteria
from prunectl.pruning.surgery import Graph, Group, analyse, compact

AUTO_ROUNDS = (8, 4, 2, 1)  # engines pad widths to multiples of 8; finer only where the budget needs it
SCOPES = {"layerwise": allocate.layerwise, "global": allocate.globally}


@dataclass(frozen=True)
class TicketPlan:
    """`dropped` channels of each group, and what it will cost; widths: group -> channels before and after.

    kept: group -> why none of its channels may go. exact: the cost before rounding to `round_to`, for the reader to see what
    rounding changed. floors: group -> the least width that any budget leaves; least: the cost when all stand there."""

    dropped: dict[str, list[int]]
    widths: dict[str, tuple[int, int]]
    kept: dict[str, str]
    dense: Cost
    cost: Cost
    exact: Cost
    floors: dict[str, int]
    least: Cost
    round_to: int
    budget: Budget
    graph: Graph

    @property
    def channels_removed(self) -> float:
        """Share of the prunable channels that go."""
        return sum(len(d) for d in self.dropped.values()) / sum(before for before, _ in self.widths.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": {"metric": self.budget.metric, "value": self.budget.value},
            "round_to": self.round_to,
            "channels_removed": self.channels_removed,
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "kept": self.kept,
            "unrounded": {"params": self.exact.params, "macs": self.exact.macs},
            "dropped": self.dropped,
        }


def plan_ticket(
    model: nn.Module,
    example: Tensor,
    *,
    budget: Budget,
    criterion: str = "spline",
    scope: str = "layerwise",
    pooling: str = "raw",
    round_to: int | None = None,
    keep: str | None = None,
    rho: float = 0.05,
    seed: int = 0,
    gradients: Mapping[str, Tensor] | None = None,
    covariances: Mapping[str, Sequence[Tensor]] | None = None,
    began: Mapping[str, int] | None = None,
) -> TicketPlan:
    """The plan that meets `budget` on `model` as it is now; the model is left alone.

    example: (1, C, H, W). pooling: what makes scores of different layers comparable under global scope. round_to: a multiple
    for every width, None for the coarsest of 8, 4, 2, 1 that meets the budget. gradients, covariances: for
    criteria that look at images, see `describe`. began: group -> channels before earlier
    prunings, which floors are a share of. Raises Unsatisfiable when nothing can go or the budget cannot be met."""
    graph = analyse(model, example)
    costs = CostModel.of(model, graph, (example.shape[1], example.shape[2], example.shape[3]))
    graph = _priced(model, graph, costs, example)
    free = allocate.prunable(graph, keep, began=began)
    views = describe(model, graph, rho=rho, seed=seed, gradients=gradients, covariances=covariances)
    score = criteria.get(criterion)
    scores = {name: score(views[name]) for name in free}
    order = {name: s.argsort(stable=True).tolist() for name, s in scores.items()}
    floors = {name: allocate.floor_of((began or {}).get(name, width)) for name, width in free.items()}
    dense, total = costs.predict({}), sum(free.values())
    if budget.metric == "channels":
        budget = replace(budget, grain=1 / (budget.whole or total))

    def share(dropped: Mapping[str, int]) -> float:
        if budget.metric == "channels":
            return 1 - (budget.gone + sum(dropped.values())) / (budget.whole or total)
        return float(getattr(costs.predict(dropped), budget.metric) / (budget.whole or getattr(dense, budget.metric)))

    comparable = {name: s / _unit(pooling, s, dense.macs - costs.predict({name: 1}).macs) for name, s in scores.items()}

    def allocation(sparsity: float, multiple: int) -> dict[str, list[int]]:
        return SCOPES[scope](comparable, sparsity=sparsity, round_to=multiple, floors=floors)

    rounds = AUTO_ROUNDS if round_to is None else (round_to,)
    dropped, used = meet(allocation, order, share, budget=budget, rounds=rounds, floors=floors)
    unrounded = dropped
    if used > 1:
        with contextlib.suppress(Unsatisfiable):
            unrounded, _ = meet(allocation, order, share, budget=budget, rounds=(1,), floors=floors)
    furthest = allocation(1.0, rounds[-1])
    return TicketPlan(
        dropped={name: channels for name, channels in dropped.items() if channels},
        widths={name: (width, width - len(dropped[name])) for name, width in free.items()},
        kept={g.name: g.locked or _reason(g, began or {}, keep) for g in graph.groups if g.name not in free},
        dense=dense,
        cost=costs.predict({name: len(channels) for name, channels in dropped.items()}),
        exact=costs.predict({name: len(channels) for name, channels in unrounded.items()}),
        floors={name: width - len(furthest[name]) for name, width in free.items()},
        least=costs.predict({name: len(channels) for name, channels in furthest.items()}),
        round_to=used,
        budget=budget,
        graph=graph,
    )


def _priced(model: nn.Module, graph: Graph, costs: CostModel, example: Tensor) -> Graph:
    """The graph with those groups locked that take part in products outside of layers, of attention say: what these cost without
    some channels is not in the arithmetic of layers."""

    def off(groups: Sequence[Group]) -> bool:
        small = compact(model, {g.name: [0] for g in groups}, example).module
        left = count(small, (example.shape[1], example.shape[2], example.shape[3]))
        return left != costs.predict({g.name: 1 for g in groups})

    free = [g for g in graph.groups if not g.locked and g.channels > 1]
    if not costs.other_macs or not free or not off(free):
        return graph
    locked = {g.name for g in free if off([g])} or {g.name for g in free}
    reason = "the network multiplies them with one another, outside of its layers"
    return replace(graph, groups=tuple(replace(g, locked=reason) if g.name in locked else g for g in graph.groups))


def _unit(pooling: str, scores: Tensor, macs: int) -> float:
    """What a layer's scores are counted in. mean: without constant units (below 0) and the highest, which the spline criterion sets
    apart. macs: those that one of its channels costs, with everything that reads it."""
    usual = scores.double()[scores >= 0].sort().values[:-1]
    return {"raw": 1.0, "mean": float(usual.mean()) if usual.sum() > 0 else 1.0, "macs": float(macs) or 1.0}[pooling]


def _reason(group: Group, began: Mapping[str, int], keep: str | None) -> str:
    floor = allocate.floor_of(began.get(group.name, group.channels))
    return f"it has no more than the {floor} channels that stay in any case" if group.channels <= floor else f"--keep '{keep}' protects it"


def composed(first: Mapping[str, list[int]], then: Mapping[str, list[int]], widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Two prunings as one: `then` numbers what `first` has left; the answer, like `first`, the network before both.

    widths: group -> channels before both."""
    together = {}
    for name in [*first, *(n for n in then if n not in first)]:
        gone = set(first.get(name, []))
        left = [c for c in range(widths[name]) if c not in gone]
        together[name] = sorted(gone | {left[c] for c in then.get(name, [])})
    return together


def check_against_plan(plan: TicketPlan, module: nn.Module, input_shape: tuple[int, int, int]) -> Cost:
    """The cost counted from the produced network. Raises VerificationFailed when it is not the plan's or nothing went."""
    counted = count(module, input_shape)
    if counted != plan.cost:
        raise VerificationFailed(
            f"the pruned network has {counted.params} parameters and {counted.macs} MACs, its plan {plan.cost.params} and {plan.cost.macs}"
        )
    if counted.params >= plan.dense.params:
        raise Unsatisfiable("nothing was pruned: the network has as many parameters as before")
    return counted
