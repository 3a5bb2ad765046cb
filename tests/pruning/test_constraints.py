"""Constraint sets: each LMO against brute force, gauges against their definition, exact counts, layout kept."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from prunectl.errors import UnknownName, Unsatisfiable, UsageError
from prunectl.pruning import constraints as c
from prunectl.pruning import topk
from tests.reference import sfw_oracle as oracle

SETS = {
    "k-sparse": c.KSparse(3, 0.7),
    "k-support": c.KSupport(3, 0.7),
    "group-k-support": c.GroupKSupport(2, 0.7),
    "nm": c.NM(2, 4, 0.7),
    "lp": c.LpBall(3.0, 0.7),
    "lp-1": c.LpBall(1.0, 0.7),
    "lp-2": c.LpBall(2.0, 0.7),
    "lp-inf": c.LpBall(math.inf, 0.7),
}
LOWEST = {
    "k-sparse": lambda g: oracle.lowest_k_sparse(g.ravel(), 3, 0.7),
    "k-support": lambda g: oracle.lowest_k_support(g.ravel(), 3, 0.7),
    "group-k-support": lambda g: oracle.lowest_group_k_support(g, 2, 0.7),
    "nm": lambda g: oracle.lowest_nm(g, 2, 4, 0.7),
    "lp": lambda g: oracle.lowest_lp(g, 3.0, 0.7),
    "lp-1": lambda g: oracle.lowest_lp(g, 1, 0.7),
    "lp-2": lambda g: oracle.lowest_lp(g, 2.0, 0.7),
    "lp-inf": lambda g: oracle.lowest_lp(g, np.inf, 0.7),
}
SHAPES = {"nm": (1, 8), "group-k-support": (4, 2)}
each_set = pytest.mark.parametrize("name", SETS)
# Few distinct values make ties; zeros and wide exponents make the rest.
entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-3, -5.0]) | st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)


@each_set
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lmo_reaches_the_lowest_value_any_vertex_has(name, data):
    g = data.draw(arrays(np.float64, SHAPES.get(name, (8,)), elements=entries))
    v = SETS[name].lmo(torch.from_numpy(g))
    lowest = LOWEST[name](g)
    # 1e-12 relative: a dozen float64 roundings
    assert torch.sum(v * torch.from_numpy(g)).item() == pytest.approx(lowest, rel=1e-12, abs=1e-300)
    assert SETS[name].gauge(v) <= 1 + 1e-12


@each_set
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gauge_is_1_on_the_shrunk_point_and_scales(name, data):
    x = torch.from_numpy(data.draw(arrays(np.float64, SHAPES.get(name, (8,)), elements=entries)))
    constraint = SETS[name]
    gauge = constraint.gauge(x).item()
    assert constraint.gauge(3 * x).item() == pytest.approx(3 * gauge, rel=1e-12)
    inside = constraint.shrink(x)
    if gauge <= 1:
        assert torch.equal(inside, x)
    else:
        assert constraint.gauge(inside).item() == pytest.approx(1, rel=1e-12) and constraint.gauge(inside) <= 1 + 1e-15
        assert torch.allclose(inside * gauge, x, rtol=1e-12, atol=0)


@each_set
def test_gauge_is_the_support_function_of_the_polar(name):
    """gauge(x) = max <x, y> over y with max over the set of <v, y> <= 1: equality is nearly met by ascent, never passed."""
    constraint = SETS[name]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal(SHAPES.get(name, (8,))))
    y = torch.from_numpy(rng.standard_normal((2000, *x.shape)))
    support = torch.stack([-(constraint.lmo(d) * d).sum() for d in y])
    values = (y * x).flatten(1).sum(1) / support
    best = y[values.argmax()].clone().requires_grad_()
    optimizer = torch.optim.Adam([best], lr=0.02)
    reached = values.max().item()
    for _ in range(600):
        objective = (best * x).sum() / -(constraint.lmo(best.detach()) * best).sum()
        reached = max(reached, objective.item())
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    gauge = constraint.gauge(x).item()
    assert gauge * (1 - 5e-3) <= reached <= gauge * (1 + 1e-12)  # subgradient ascent stays near the kink, on either side


@each_set
def test_no_two_points_lie_further_apart_than_the_diameter(name):
    constraint = SETS[name]
    shape = torch.Size(SHAPES.get(name, (8,)))
    g = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.stack([constraint.lmo(d) for d in g]).flatten(1)
    diameter = constraint.diameter(shape)
    assert torch.cdist(points, points).max() <= diameter * (1 + 1e-12)
    spread = torch.stack([constraint.lmo(d.sign()) - constraint.lmo(-d.sign()) for d in g]).flatten(1).norm(dim=1).max()
    assert spread == pytest.approx(diameter, rel=1e-12)  # antipodal vertices of a flat direction attain it


@each_set
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lmo_keeps_dtype_and_layout_and_does_not_depend_on_layout(name, dtype):
    g = (torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1)) * 4).round().to(dtype)  # many ties
    row_major = SETS[name].lmo(g)
    channels_last = SETS[name].lmo(g.to(memory_format=torch.channels_last))
    assert row_major.dtype == channels_last.dtype == dtype
    assert row_major.is_contiguous() and channels_last.is_contiguous(memory_format=torch.channels_last)
    eps = torch.finfo(dtype).eps  # sums run in another order, so one rounding of the norm apart
    assert torch.equal(row_major != 0, channels_last != 0) and torch.allclose(row_major, channels_last, rtol=2 * eps, atol=0)


@each_set
def test_lmo_of_zero_is_zero_and_input_stays(name):
    zero = torch.zeros(8, 8, 2, 2)
    assert torch.equal(SETS[name].lmo(zero), zero)
    g = torch.randn(8, 8, 2, 2, generator=torch.Generator().manual_seed(2))
    before = g.clone()
    SETS[name].lmo(g)
    assert torch.equal(g, before)


@each_set
def test_lmo_over_used_memory_is_the_same_as_over_new(name):
    memory = torch.full((64 * 64 * 9 + 5,), torch.nan)
    g = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(3))
    for layout in (torch.contiguous_format, torch.channels_last):
        g = g.contiguous(memory_format=layout)
        assert torch.equal(SETS[name].lmo(g, memory=memory), SETS[name].lmo(g))
    assert torch.equal(SETS[name].lmo(g.double(), memory=memory), SETS[name].lmo(g.double()))  # does not fit


def test_lmo_of_every_set_is_that_of_the_oracle_on_a_convolution():
    g = np.random.default_rng(4).standard_normal((8, 8, 3, 3))
    expected = {
        c.KSparse(29, 0.3): oracle.k_sparse(g, 29, 0.3),
        c.KSupport(29, 0.3): oracle.k_support(g, 29, 0.3),
        c.GroupKSupport(3, 0.3): oracle.group_k_support(g, 3, 0.3),
        c.NM(2, 4, 0.3): oracle.nm(g, 2, 4, 0.3),
        c.NM(1, 2, 0.3): oracle.nm(g, 1, 2, 0.3),
        c.LpBall(1.5, 0.3): oracle.lp(g, 1.5, 0.3),
    }
    for constraint, v in expected.items():
        assert np.allclose(constraint.lmo(torch.from_numpy(g)).numpy(), v, rtol=1e-12, atol=0), constraint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", ["normal", "ties", "sparse", "zero"])
@pytest.mark.parametrize("size", [7, 9000, 70001])  # below the partition limit, sampled bracket, several chunks
@pytest.mark.parametrize("without_sync", [False, True])
def test_top_k_is_that_of_a_stable_sort(dtype, source, size, without_sync):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator)
    x = {"normal": x, "ties": (2 * x).round(), "sparse": x * (torch.rand(size, generator=generator) < 0.01), "zero": 0 * x}[source].to(
        dtype
    )
    for k in {1, size // 20 or 1, size // 2, size - 1}:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.from_numpy(oracle.largest(x.double().numpy(), k))] = True
        found = topk._mask_without_sync(x, k) if without_sync else topk.top_k_mask(x, k)
        assert torch.equal(found, mask)
        kept = topk._top_k_without_sync(x, k) if without_sync else topk.top_k(x, k)
        assert torch.equal(kept, torch.where(mask, x, 0)) and kept.dtype == dtype


def test_top_k_is_exact_where_the_sample_misleads():
    x = torch.zeros(100_000)
    x[1:60_000] = torch.linspace(1, 2, 59_999)  # sorted: a stride sees fine, a constant block does not
    x[::37] = 5.0
    for k in (1, 2702, 2703, 2704, 30_000, 60_000, 99_999):
        expected = torch.zeros(100_000, dtype=torch.bool)
        expected[torch.from_numpy(oracle.largest(x.numpy(), k))] = True
        assert torch.equal(topk.top_k_mask(x, k), expected)


def test_top_k_of_a_strided_view():
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(5))[:, ::3]
    assert torch.equal(topk.top_k(x, 100), topk.top_k(x.contiguous(), 100))


@each_set
def test_survives_a_checkpoint_as_plain_numbers(name):
    data = SETS[name].to_dict()
    assert c.from_dict(json.loads(json.dumps(data))) == SETS[name]


def test_registry_names_are_the_kinds():
    assert c.constraints.names() == ["group-k-support", "k-sparse", "k-support", "lp", "nm", "none"]
    for kind in c.constraints.names():
        assert c.constraints.get(kind).kind == kind
    with pytest.raises(UnknownName, match="k-sparse"):
        c.from_dict({"kind": "k-sparce", "k": 1, "radius": 1.0})


@pytest.mark.parametrize(
    "make",
    [
        lambda: c.KSparse(0, 1.0),
        lambda: c.KSparse(2.5, 1.0),
        lambda: c.KSparse(2, -1.0),
        lambda: c.KSupport(2, math.nan),
        lambda: c.GroupKSupport(1, 0.0),
        lambda: c.NM(3, 2, 1.0),
        lambda: c.LpBall(0.5, 1.0),
        lambda: c.Unconstrained().lmo(torch.ones(2)),
        lambda: c.NM(2, 4, 1.0).lmo(torch.ones(8, 3, 3, 3)),
        lambda: c.sets_for([("w", torch.ones(4, 4))], "k-sparse", k_fraction=0),
        lambda: c.sets_for([("w", torch.ones(4, 4))], "k-sparse", k_fraction=2),
        lambda: c.sets_for([("w", torch.ones(4, 4))], "k-sparse", tau=-1),
        lambda: c.sets_for([("w", torch.ones(4, 4))], "nm", n=5, m=4),
        lambda: c.sets_for([("w", torch.ones(4, 4))], "k-sparce"),
    ],
)
def test_bad_values_are_usage_errors(make):
    with pytest.raises(UsageError):
        make()


def named(net):
    return list(net.named_parameters())


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        torch.nn.BatchNorm2d(16),
        torch.nn.Conv2d(16, 16, 3, groups=16),
        torch.nn.Conv2d(16, 8, 1),
        torch.nn.Linear(8, 10),
    )


@pytest.mark.parametrize("kind", ["k-sparse", "k-support", "group-k-support", "nm", "lp"])
def test_every_set_of_a_model_has_the_diameter_asked_for(kind):
    model = network()
    sets = c.sets_for(named(model), kind, tau=15).sets
    assert list(sets) == [name for name, _ in named(model)]
    for name, w in named(model):
        norm = w.detach().norm().item() or 1.0
        assert sets[name].diameter(w.shape) == pytest.approx(30 * norm, rel=1e-6), name  # float32 norm


def test_k_counts_entries_as_published():
    sets = c.sets_for([("a", torch.ones(4)), ("b", torch.ones(100)), ("c", torch.ones(1000, 2))], "k-sparse").sets
    assert [sets[n].k for n in "abc"] == [4, 10, 100]
    assert sets["c"].radius == pytest.approx(15 * math.sqrt(2000) / math.sqrt(100), rel=1e-6)


def test_layers_without_channel_groups_stay_on_a_ball_and_are_listed():
    plan = c.sets_for(named(network()), "nm")
    assert plan.on_l2_ball == ("0.weight", "2.weight")  # 3 input channels; depthwise
    assert isinstance(plan.sets["3.weight"], c.NM) and isinstance(plan.sets["4.weight"], c.NM)
    assert plan.sets["1.bias"] == c.LpBall(2.0, radius=15.0)  # |0| counts as 1
    with pytest.raises(Unsatisfiable, match="divisible by 4"):
        c.sets_for(named(network()[:3]), "nm")


def test_filters_are_counted_per_convolution():
    plan = c.sets_for(named(network()), "group-k-support", k_fraction=0.3)
    assert plan.sets["0.weight"].k == 5 and plan.sets["3.weight"].k == 2
    assert plan.on_l2_ball == ("4.weight",)
    with pytest.raises(Unsatisfiable):
        c.sets_for([("w", torch.ones(4, 4))], "group-k-support")


@pytest.mark.parametrize("name", ["k-support", "group-k-support", "nm", "lp-2"])
@pytest.mark.parametrize("scale", [1e-25, 4.4e-23, 1.0, 1e20, 1e30])
def test_vertices_have_their_length_at_every_scale_of_single_precision(name, scale):
    """Squares of 1e20 are infinite in float32, those of 1e-25 are 0."""
    g = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * scale
    v = SETS[name].lmo(g)
    assert v.double().norm().item() == pytest.approx(0.7, rel=1e-5) and SETS[name].gauge(v) <= 1 + 1e-5
    assert (v.double() * g.double()).sum() < 0


def test_the_larger_filter_stays_in_half_precision():
    """Their norms, 17.32 and 17.36, are one number in bfloat16."""
    g = torch.stack([torch.full((3, 10, 10), 1.0), torch.full((3, 10, 10), 1.0)]).bfloat16()
    g[1, 0, 0, 0] = 1.5
    v = c.GroupKSupport(1, 1.0).lmo(g)
    assert not v[0].any() and v[1].any()
