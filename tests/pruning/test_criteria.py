"""Criteria: the contract that all share, on whole networks and on bare channels; then each against loops."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import PRUNABLE, SelfConcatenated, images, plain, randomised
from torch import Tensor, nn

from prunectl.errors import Unsatisfiable
from prunectl.pruning import spline as geometry
from prunectl.pruning.channels import Channels, describe
from prunectl.pruning.criteria import criteria
from prunectl.pruning.moments import covariances
from prunectl.pruning.surgery import Group, analyse

NAMES = criteria.names()
EQUIVARIANT = [n for n in NAMES if n != "random"]  # a draw goes by place
NETS = {**PRUNABLE, "self_concatenated": SelfConcatenated}


def channels(n: int, seed: int = 0, *, dim: int = 9, norms: int = 2) -> Channels:
    g = torch.Generator().manual_seed(seed)
    filters, weights, gradients = (torch.randn(n, dim, generator=g) for _ in range(3))
    inputs, read = (torch.randn(2, 3 * n, n, generator=g, dtype=torch.float64) for _ in range(2))
    return Channels(
        name="made-up",
        filters=filters,
        bias=torch.randn(n, generator=g),
        weights=weights,
        gammas=torch.rand(n, norms, generator=g),
        scale=0.1 + torch.rand(n, generator=g),
        outgoing=0.1 + torch.rand(n, generator=g),
        gradients=gradients,
        readers=tuple((x.T @ x / len(x), w.T @ w) for x, w in zip(inputs, read, strict=True)),
        rho=0.05,
        seed=seed,
    )


def moved(c: Channels, order: Tensor) -> Channels:
    rows = {f.name: getattr(c, f.name)[order] for f in dataclasses.fields(c) if isinstance(getattr(c, f.name), Tensor)}
    assert c.readers is not None
    readers = tuple((k[order][:, order], g[order][:, order]) for k, g in c.readers)
    return dataclasses.replace(c, **rows, readers=readers)


# ---- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_scores_have_the_shape_are_finite_and_repeat(name: str, n: int) -> None:
    c = channels(n)
    before = {f.name: copy.deepcopy(getattr(c, f.name)) for f in dataclasses.fields(c)}
    state = torch.get_rng_state()
    score = criteria.get(name)(c)
    assert score.shape == (n,) and score.dtype == torch.float64 and torch.isfinite(score).all()
    assert torch.equal(score, criteria.get(name)(c))
    assert torch.equal(state, torch.get_rng_state())
    for field, value in before.items():
        now = getattr(c, field)
        if isinstance(value, Tensor | tuple):
            torch.testing.assert_close(now, value, rtol=0, atol=0)
        else:
            assert now == value


@pytest.mark.parametrize("name", EQUIVARIANT)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 30))
def test_scores_follow_a_permutation(name: str, seed: int, n: int) -> None:
    c, order = channels(n, seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    score = criteria.get(name)
    assert torch.allclose(score(moved(c, order)), score(c)[order], atol=1e-9)  # float64 sums in another order


def permuted(model: nn.Module, group: Group, order: Tensor) -> nn.Module:
    """The same network with the group's channels in another order, in every layer that writes or reads them."""
    model = copy.deepcopy(model)
    done: set[tuple[int, int]] = set()
    for m in group.members:
        layer = model.get_submodule(m.layer)
        places = sorted(zip(m.root, m.index, strict=True))
        index = torch.tensor([i for _, i in places]).view(group.channels, -1)
        tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.dim() and (t.dim() > 1 or m.out) and len(t) > 1]
        for t in tensors:
            dim = 0 if m.out else 1
            if (id(t), dim) not in done:
                done.add((id(t), dim))
                t.data = t.data.index_copy(dim, index.flatten(), t.data.index_select(dim, index[order].flatten()))
    return model


@pytest.mark.parametrize("net", NETS)
def test_scores_follow_a_permutation_inside_a_network(net: str) -> None:
    """Every reader and writer of every group: a wrong index anywhere changes the network or its scores."""
    model, x = randomised(NETS[net]()), images()
    graph = analyse(model, x[:1])
    model(x).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for group in (g for g in graph.groups if not g.locked):
        order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(0))
        other = permuted(model, group, order)
        carrier = copy.deepcopy(model)
        for n, p in carrier.named_parameters():
            p.data = gradients[n]
        carried = dict(permuted(carrier, group, order).named_parameters())
        with torch.no_grad():
            assert torch.allclose(other(x), model(x), rtol=1e-10)
        before = describe(model, graph, gradients=gradients, covariances=covariances(model, graph, [x]))
        after = describe(other, graph, gradients={n: p.detach() for n, p in carried.items()}, covariances=covariances(other, graph, [x]))
        for name in EQUIVARIANT:
            if name == "bn-scale" and before[group.name].gammas.shape[1] == 0:
                continue
            a, b = criteria.get(name)(before[group.name]), criteria.get(name)(after[group.name])
            assert torch.allclose(b, a[order], rtol=1e-4, atol=1e-6), (name, group.name)  # float32 views


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = randomised(plain())
    gradients = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    graph = analyse(model, images(1))
    for c in describe(model, graph, gradients=gradients, covariances=covariances(model, graph, [images()])).values():
        criteria.get(name)(c)
        for t in (c.filters, c.weights, c.bias):
            t.add_(1)  # a view of the network would change with it
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(bool((g == 1).all()) for g in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_filters_of_zeros_and_exact_copies_are_ranked_without_nan(name: str) -> None:
    c = channels(12)
    c.filters[3], c.weights[3], c.gammas[3] = 0, 0, 0
    assert c.readers is not None
    for covariance, _ in c.readers:
        covariance[3], covariance[:, 3] = 0, 0
    c.filters[7], c.weights[7], c.bias[7] = c.filters[2], c.weights[2], c.bias[2]
    score = criteria.get(name)(c)
    assert torch.isfinite(score).all()
    if name not in ("random", "fpgm"):
        assert int(score.argmin()) == 3, "a channel of zeros is the first to go"
    for dead in (torch.zeros_like(c.filters), torch.ones_like(c.filters)):
        assert torch.isfinite(criteria.get(name)(dataclasses.replace(c, filters=dead, weights=dead))).all()


# ---- each against loops


def by_rows(c: Channels, f: Callable[[np.ndarray], float]) -> list[float]:
    return [f(row) for row in c.weights.double().numpy()]


def test_norm_criteria_equal_loops() -> None:
    c = channels(11)
    w = c.weights.double().numpy()
    assert criteria.get("l1")(c).tolist() == pytest.approx(by_rows(c, lambda r: sum(abs(v) for v in r)))
    assert criteria.get("l2")(c).tolist() == pytest.approx(by_rows(c, lambda r: sum(v * v for v in r) ** 0.5))
    distances = [sum(float(np.linalg.norm(a - b)) for b in w) for a in w]
    assert criteria.get("fpgm")(c).tolist() == pytest.approx(distances)
    assert criteria.get("bn-scale")(c).tolist() == pytest.approx([sum(row) / len(row) for row in c.gammas.tolist()], rel=1e-6)
    assert c.gradients is not None
    products = [sum(a * b for a, b in zip(x, y, strict=True)) ** 2 for x, y in zip(w.tolist(), c.gradients.tolist(), strict=True)]
    assert criteria.get("taylor")(c).tolist() == pytest.approx(products)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    """A small step of a filter towards zero changes the loss by step * sum(w g)."""
    model, x = randomised(plain(12, 10)), images()
    loss = model(x).square().mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    score = criteria.get("taylor")(describe(model, analyse(model, x[:1]), gradients=gradients)["3"])
    step = 1e-6
    for k in (0, 4, 9):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[3].weight[k] *= 1 - step
            change = (other(x).square().mean() - loss) / step
        assert float(change) ** 2 == pytest.approx(float(score[k]), rel=1e-3, abs=1e-12)  # second order in the step, float32 views


@pytest.mark.parametrize(
    ("name", "distances"),
    [
        ("spline", geometry.hyperplane_distances),
        ("spline-signed", geometry.signed_distances),
        ("spline-published", geometry.published_distances),
    ],
)
def test_spline_criteria_rank_by_their_form_of_the_distance(name: str, distances: Callable[..., Tensor]) -> None:
    c = dataclasses.replace(channels(20), rho=0.7)
    priced = name != "spline-published"
    expected = geometry.spline_scores(c.filters, c.bias, c.scale * c.outgoing, rho=0.7, distances=distances, priced=priced)
    assert torch.equal(criteria.get(name)(c), expected)


@pytest.mark.parametrize("name", ["spline", "spline-signed"])
def test_a_network_rescaled_through_its_relus_has_the_same_spline_scores(name: str) -> None:
    """Scale and shift of a batch norm times c, its readers over c: the same function, the same hyperplanes."""
    model, x = randomised(plain(12, 10)), images()
    graph = analyse(model, x[:1])
    other = copy.deepcopy(model)
    factor = torch.linspace(0.2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        other[1].weight *= factor
        other[1].bias *= factor
        other[3].weight /= factor[None, :, None, None]
        assert torch.allclose(other(x), model(x))
    a, b = (criteria.get(name)(describe(m, graph)["0"]) for m in (model, other))
    assert torch.allclose(a, b, atol=1e-6)  # float32 views


def test_of_two_near_copies_the_one_whose_scale_is_smaller_goes() -> None:
    """The filter of channel 4 is twice that of 9 once batch norm is folded in, only because its deviation is small."""
    model = randomised(plain(12, 10))
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[9] * 1e-3
        model[1].running_mean[4] = model[1].running_mean[9] * 1e-3
        model[1].running_var[4] = model[1].running_var[9] * 1e-8
        model[1].eps = 0.0
        model[1].weight[4], model[1].weight[9] = 0.2, 1.0
        model[1].bias[4] = model[1].bias[9] * 0.2
    c = describe(model, analyse(model, images(1)))["0"]
    assert c.filters[4].norm() > c.filters[9].norm()
    for name in ("spline", "spline-signed"):
        score = criteria.get(name)(dataclasses.replace(c, outgoing=torch.ones(12)))
        assert score.argmin() == 4


def test_random_depends_on_seed_and_group_only() -> None:
    a, b = channels(20, 1), channels(20, 2)
    draw = criteria.get("random")
    assert torch.equal(draw(a), draw(dataclasses.replace(b, seed=1)))
    assert not torch.equal(draw(a), draw(b))


def test_criteria_that_lack_what_they_need_say_so() -> None:
    c = channels(8)
    with pytest.raises(Unsatisfiable, match="made-up pass through no batch norm; use another criterion"):
        criteria.get("bn-scale")(dataclasses.replace(c, gammas=torch.zeros(8, 0)))
    with pytest.raises(Unsatisfiable, match="taylor needs gradients"):
        criteria.get("taylor")(dataclasses.replace(c, gradients=None))
    with pytest.raises(Unsatisfiable, match="obs needs the covariance"):
        criteria.get("obs")(dataclasses.replace(c, readers=None))
