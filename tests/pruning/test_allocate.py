"""How many channels each group loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning.allocate import floor_of, globally, layerwise, prunable
from prunectl.pruning.surgery import Graph, Group, Member

WIDTHS = st.lists(st.integers(9, 200), min_size=1, max_size=5)


def scores(widths: list[int]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layer{i}": torch.rand(w, generator=draw, dtype=torch.float64) for i, w in enumerate(widths)}


@settings(deadline=None, max_examples=60)
@given(WIDTHS, st.floats(0, 1), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([layerwise, globally]))
def test_floors_multiples_and_the_lowest_scores(widths: list[int], sparsity: float, round_to: int, allocate) -> None:  # type: ignore[no-untyped-def]
    given_scores = scores(widths)
    for name, dropped in allocate(given_scores, sparsity=sparsity, round_to=round_to).items():
        s = given_scores[name]
        kept = len(s) - len(dropped)
        assert kept >= floor_of(len(s))
        assert kept == len(s) or kept % round_to == 0
        stays = [i for i in range(len(s)) if i not in dropped]
        assert dropped == sorted(set(dropped))
        assert not dropped or s[dropped].max() <= s[stays].min()


@settings(deadline=None, max_examples=30)
@given(WIDTHS, st.floats(0, 1), st.floats(0, 1), st.sampled_from([layerwise, globally]))
def test_more_sparsity_never_keeps_more(widths: list[int], a: float, b: float, allocate) -> None:  # type: ignore[no-untyped-def]
    less, more = (allocate(scores(widths), sparsity=s, round_to=1) for s in sorted((a, b)))
    assert all(set(less[name]) <= set(more[name]) for name in less)


def test_ties_go_by_the_lower_index() -> None:
    assert layerwise({"a": torch.zeros(16)}, sparsity=0.25, round_to=1) == {"a": [0, 1, 2, 3]}


def test_global_takes_from_where_scores_are_low() -> None:
    low, high = torch.linspace(0, 1, 40), torch.linspace(2, 3, 40)
    dropped = globally({"low": low, "high": high}, sparsity=0.25, round_to=1)
    assert len(dropped["low"]) == 20
    assert dropped["high"] == []


@pytest.mark.parametrize(("channels", "floor"), [(4, 4), (8, 8), (16, 8), (80, 8), (100, 10), (2048, 205)])
def test_a_group_keeps_eight_channels_or_a_tenth(channels: int, floor: int) -> None:
    assert floor_of(channels) == floor


def group(name: str, channels: int, locked: str | None = None) -> Group:
    numbers = tuple(range(channels))
    return Group(name, channels, (Member(name, True, numbers, numbers),), locked)


def test_what_is_locked_narrow_or_kept_does_not_shrink() -> None:
    graph = Graph((group("a", 32), group("b", 32, "because"), group("c", 8), group("layer3.d", 64)), {})
    assert prunable(graph) == {"a": 32, "layer3.d": 64}
    assert prunable(graph, keep="layer3") == {"a": 32}
    with pytest.raises(Unsatisfiable, match="because"):
        prunable(graph, keep="a|d")
    with pytest.raises(UsageError, match="regular expression"):
        prunable(graph, keep="(")
