"""Predicted cost against counted cost, and widths that keep to their multiple."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from pruning_nets import PRUNABLE, images, randomised

from prunectl import models
from prunectl.errors import Unsatisfiable
from prunectl.pruning import cost
from prunectl.pruning.allocate import floor_of, prunable
from prunectl.pruning.budget import Budget, CostModel, _neighbours, meet
from prunectl.pruning.surgery import analyse, compact
from prunectl.pruning.ticket import SCOPES


@pytest.mark.parametrize("net", PRUNABLE)
def test_the_predicted_cost_is_the_counted_cost(net: str) -> None:
    model, x = randomised(PRUNABLE[net]()), images(1)
    graph = analyse(model, x)
    costs, rng = CostModel.of(model, graph, (3, 8, 8)), np.random.default_rng(0)
    assert costs.predict({}) == cost.count(model, (3, 8, 8))
    for _ in range(3):
        plan = {g.name: list(range(int(rng.integers(0, g.channels)))) for g in graph.groups if not g.locked}
        with torch.no_grad():
            small = compact(model, plan, x).module
        assert costs.predict({n: len(c) for n, c in plan.items()}) == cost.count(small, (3, 8, 8))


def test_a_budget_out_of_reach_is_refused_without_trying_every_pair_of_groups() -> None:
    """The number of plans that are priced grows with the groups, not with their square."""
    groups, asked = {f"g{i}": list(range(64)) for i in range(100)}, 0

    def share(dropped: Mapping[str, int]) -> float:
        nonlocal asked
        asked += 1
        return 1 - sum(dropped.values()) / 6400

    def allocate(sparsity: float, multiple: int) -> dict[str, list[int]]:
        return {g: order[: min(56, int(64 * sparsity))] for g, order in groups.items()}

    with pytest.raises(Unsatisfiable, match=r"at most 0\.875"):
        meet(allocate, groups, share, budget=Budget("channels", 0.95), rounds=(8, 4, 2, 1), floors=dict.fromkeys(groups, 8))
    assert asked < 4 * (30 + 4 * len(groups))


def test_neighbouring_widths_are_multiples_or_all_channels() -> None:
    """20 channels in multiples of 8 may be 20, 16 or 8: one step from none dropped is 4, not 8."""
    assert _neighbours(0, 20, 8, 8) == [4]
    assert _neighbours(4, 20, 8, 8) == [12, 0]
    assert _neighbours(12, 20, 8, 8) == [4]
    assert _neighbours(0, 8, 8, 8) == []


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_what_some_widths_would_meet_is_not_refused(scope: str, step: int, metric: str) -> None:
    """Against all widths that there are, whatever the scores."""
    model, x = models.build("resnet8", num_classes=10, in_channels=1, image_size=28), torch.zeros(1, 1, 28, 28)
    graph = analyse(model, x)
    costs, free = CostModel.of(model, graph, (1, 28, 28)), prunable(graph)
    whole, rng = getattr(costs.predict({}), metric), np.random.default_rng(0)
    widths = [[0, *(n - w for w in range(step, n, step) if w >= floor_of(n))] for n in free.values()]
    every = np.array([getattr(costs.predict(dict(zip(free, gone, strict=True))), metric) / whole for gone in itertools.product(*widths)])
    outcomes = set()
    for target in rng.uniform(0.9 * every.min(), 1, 20):
        scores = {name: torch.from_numpy(rng.random(n) * rng.uniform(0.5, 2)) for name, n in free.items()}
        order = {name: s.argsort().tolist() for name, s in scores.items()}
        floors = {name: floor_of(n) for name, n in free.items()}
        reachable = bool((np.abs(every - target) <= 0.02 * target)[1:].any())
        try:
            plan, _ = meet(
                lambda sparsity, multiple, s=scores, f=floors: SCOPES[scope](s, sparsity=sparsity, round_to=multiple, floors=f),
                order,
                lambda gone: getattr(costs.predict(gone), metric) / whole,
                budget=Budget(metric, float(target)),
                rounds=(step,),
                floors=floors,
            )
        except Unsatisfiable:
            assert not reachable, target
        else:
            share = getattr(costs.predict({n: len(c) for n, c in plan.items()}), metric) / whole
            assert abs(share - target) <= 0.02 * target and reachable
        outcomes.add(reachable)
    assert outcomes == {True, False}, "targets of one kind only show nothing"
