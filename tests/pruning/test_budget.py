"""Predicted cost against counted cost, and widths that keep to their multiple."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from pruning_nets import PRUNABLE, images, randomised

from prunectl.errors import Unsatisfiable
from prunectl.pruning import cost
from prunectl.pruning.budget import Budget, CostModel, _neighbours, meet
from prunectl.pruning.surgery import analyse, compact


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
