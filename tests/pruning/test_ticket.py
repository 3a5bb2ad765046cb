"""Criterion, scope and budget put together on real networks."""

from __future__ import annotations

import copy
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from prunectl import models
from prunectl.errors import Unsatisfiable, VerificationFailed
from prunectl.pruning.allocate import floor_of
from prunectl.pruning.budget import TOLERANCE, Budget
from prunectl.pruning.channels import describe
from prunectl.pruning.cost import count
from prunectl.pruning.surgery import analyse, compact
from prunectl.pruning.ticket import check_against_plan, composed, plan_ticket

SHAPE = (1, 28, 28)
EXAMPLE = torch.zeros(1, *SHAPE)
NETS = {"resnet8": 1.0, "resnet20": 1.0, "vgg16": 0.25, "preresnet-20": 1.0, "mobilenet-v2": 0.5}


def network(name: str) -> nn.Module:
    return models.build(name, num_classes=10, in_channels=1, image_size=28, width=NETS[name])


@pytest.mark.parametrize("name", NETS)
def test_twenty_random_budgets_are_met_within_two_percent_or_refused(name: str) -> None:
    model, draw = network(name), random.Random(0)
    dense = count(model, SHAPE)
    for i in range(20):
        budget = Budget(draw.choice(("macs", "params", "channels")), draw.uniform(0.1, 0.9))
        try:
            plan = plan_ticket(model, EXAMPLE, budget=budget, criterion="l2", scope=("layerwise", "global")[i % 2])
        except Unsatisfiable as e:
            refused = str(e)
        else:
            refused = ""
        if refused:
            least = re.search(r"the least (0\.\d+)|at most (0\.\d+)", refused)
            assert least, refused
            assert budget.keeps < (float(least[1]) if least[1] else 1 - float(least[2])) + 0.001, f"refused within reach: {refused}"
            continue
        counted = check_against_plan(plan, compact(model, plan.dropped, EXAMPLE).module, SHAPE)
        if budget.metric == "channels":
            assert abs(plan.channels_removed - budget.value) <= max(
                TOLERANCE * budget.value, 0.5 / sum(b for b, _ in plan.widths.values()) + 1e-9
            )
        else:
            share = getattr(counted, budget.metric) / getattr(dense, budget.metric)
            assert abs(share - budget.value) <= TOLERANCE * budget.value


def test_a_network_that_is_not_its_plans_is_refused() -> None:
    """Cut one channel more than planned, or nothing at all under a plan of nothing."""
    model = network("resnet8")
    plan = plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.5), criterion="l2")
    group, gone = next(iter(plan.dropped.items()))
    left = next(c for c in range(plan.widths[group][0]) if c not in gone)
    with pytest.raises(VerificationFailed, match="its plan"):
        check_against_plan(plan, compact(model, {**plan.dropped, group: [*gone, left]}, EXAMPLE).module, SHAPE)
    with pytest.raises(VerificationFailed, match="its plan"):
        check_against_plan(plan, model, SHAPE)
    with pytest.raises(Unsatisfiable, match="nothing was pruned"):
        check_against_plan(replace(plan, dropped={}, cost=plan.dense), model, SHAPE)


def test_channels_that_are_multiplied_outside_of_layers_stay_and_the_others_meet_the_budget() -> None:
    """What single-head attention costs is not in the arithmetic of layers."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 32, 4, 4), nn.Linear(32, 5)
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = self.stem(x).relu().flatten(2).transpose(1, 2)
            seen = nn.functional.scaled_dot_product_attention(self.q(t), self.k(t), self.v(t), scale=32**-0.5)
            return self.head(self.o(seen).relu().mean(1))

    model, example = Attending(), torch.zeros(1, 1, 16, 16)
    plan = plan_ticket(model, example, budget=Budget("channels", 0.4), criterion="l2")
    check_against_plan(plan, compact(model, plan.dropped, example).module, (1, 16, 16))
    assert set(plan.widths) == {"stem", "o"} and "outside of its layers" in plan.kept["v"]


def test_two_prunings_in_turn_are_the_one_that_they_compose_to() -> None:
    """Pruning what was pruned, and pruning once by the composed plan, leave the same network."""
    model = network("resnet8").eval()
    first = plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.3), criterion="l2")
    once = compact(model, first.dropped, EXAMPLE).module
    second = plan_ticket(once, EXAMPLE, budget=Budget("channels", 0.3), criterion="random")
    twice = compact(once, second.dropped, EXAMPLE).module
    widths = {name: width for name, (width, _) in first.widths.items()}
    direct = compact(model, composed(first.dropped, second.dropped, widths), EXAMPLE).module
    assert second.dropped and count(twice, SHAPE).params < count(once, SHAPE).params
    for (name, a), (_, b) in zip(twice.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_floors_are_a_share_of_what_a_group_began_with() -> None:
    """A second pruning may not go below a tenth of the first width, however narrow the group has become."""
    model = network("vgg16").eval()
    first = plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.7), criterion="l2")
    once = compact(model, first.dropped, EXAMPLE).module
    began = {name: width for name, (width, _) in first.widths.items()}
    whole, gone = sum(began.values()), sum(map(len, first.dropped.values()))
    budget = Budget("channels", 0.87, whole=whole, gone=gone)
    second = plan_ticket(once, EXAMPLE, budget=budget, criterion="l2", round_to=1, began=began)
    assert all(after >= floor_of(began[name]) for name, (_, after) in second.widths.items())
    with pytest.raises(Unsatisfiable, match="at most"):
        plan_ticket(once, EXAMPLE, budget=replace(budget, value=0.95), criterion="l2", began=began)


@pytest.mark.parametrize(("metric", "value"), [("channels", 0.6), ("macs", 0.2), ("params", 0.2)])
def test_a_budget_can_be_told_from_the_network_before(metric: str, value: float) -> None:
    model = network("resnet20").eval()
    dense = count(model, SHAPE)
    first = plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.3), criterion="l2")
    once = compact(model, first.dropped, EXAMPLE).module
    gone = sum(len(d) for d in first.dropped.values())
    channels = sum(before for before, _ in first.widths.values())
    whole = channels if metric == "channels" else getattr(dense, metric)
    budget = Budget(metric, value, whole=whole, gone=gone if metric == "channels" else 0)
    second = plan_ticket(once, EXAMPLE, budget=budget, criterion="l2")
    if metric == "channels":
        removed = gone + sum(len(d) for d in second.dropped.values())
        assert abs(removed / channels - value) <= TOLERANCE * value
    else:
        assert abs(getattr(second.cost, metric) / getattr(dense, metric) - value) <= TOLERANCE * value


def test_the_model_is_left_alone_and_two_plans_are_equal() -> None:
    model = network("resnet8")
    before = copy.deepcopy(model.state_dict())
    first, second = (plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.5)) for _ in range(2))
    assert first.dropped == second.dropped
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_keep_protects_every_layer_coupled_to_a_match() -> None:
    plan = plan_ticket(network("resnet8"), EXAMPLE, budget=Budget("macs", 0.8), keep=r"^conv1$")
    assert "conv1" not in plan.dropped
    assert plan.dropped


def test_an_asked_multiple_is_kept_or_refused() -> None:
    plan = plan_ticket(network("vgg16"), EXAMPLE, budget=Budget("channels", 0.5), round_to=16)
    assert all(after == before or after % 16 == 0 for before, after in plan.widths.values())
    with pytest.raises(Unsatisfiable, match=r"--sparsity 0\.99 cannot be met"):
        plan_ticket(network("resnet8"), EXAMPLE, budget=Budget("channels", 0.99))


def test_classifier_outputs_stay() -> None:
    model = network("resnet8")
    plan = plan_ticket(model, EXAMPLE, budget=Budget("channels", 0.5), scope="global")
    assert compact(model, plan.dropped, EXAMPLE).module(EXAMPLE).shape == (1, 10)


def test_pooled_scores_are_made_comparable() -> None:
    """l2 grows with the weights: a layer scaled up loses nothing in the raw pool, and what the others lose over its mean."""
    model = network("resnet8")
    loud = "layer2.0.conv1"
    with torch.no_grad():
        model.get_submodule(loud).weight.mul_(100)
    gone = {}
    for pooling in ("raw", "mean"):
        plan = plan_ticket(model, EXAMPLE, budget=Budget("macs", 0.4), criterion="l2", scope="global", pooling=pooling, round_to=1)
        gone[pooling] = len(plan.dropped.get(loud, []))
    assert gone["raw"] == 0 < gone["mean"]


def test_scores_per_mac_cut_where_a_channel_costs_most() -> None:
    shares = {}
    for pooling in ("raw", "macs"):
        plan = plan_ticket(
            network("resnet8"), EXAMPLE, budget=Budget("channels", 0.4), criterion="random", scope="global", pooling=pooling, round_to=1
        )
        shares[pooling] = [len(plan.dropped.get(n, [])) / plan.widths[n][0] for n in ("layer1.0.conv1", "layer3.0.conv1")]
    assert shares["macs"][0] > shares["raw"][0] and shares["macs"][1] < shares["raw"][1]


def test_a_depthwise_bias_moves_no_hyperplane_of_the_layer_before() -> None:
    model = network("mobilenet-v2").eval()
    graph = analyse(model, EXAMPLE)
    before = {n: c.bias for n, c in describe(model, graph).items()}
    depthwise = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    norms = [graph.norm_after[n] for n in depthwise]
    with torch.no_grad():
        for name in norms:
            model.get_submodule(name).bias.add_(1.0)
    after = {n: c.bias for n, c in describe(model, analyse(model, EXAMPLE)).items()}
    assert depthwise and all(torch.equal(before[n], after[n]) for n in before)
