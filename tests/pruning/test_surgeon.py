"""Optimal Brain Surgeon for channels against the error it claims to know, worked out afresh for every set of channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import PRUNABLE, flattened, images, plain, randomised
from torch import Tensor, nn

from prunectl.errors import VerificationFailed
from prunectl.pruning import surgeon
from prunectl.pruning.channels import describe
from prunectl.pruning.criteria import criteria
from prunectl.pruning.moments import Moments, covariances
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgeon import RIDGE, removal_errors
from prunectl.pruning.surgery import analyse

Reader = tuple[Tensor, Tensor]


def reader(n: int, seed: int, rows: int | None = None) -> Reader:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    x = torch.randn(rows or 4 * n, n, generator=g, dtype=torch.float64) @ mix
    w = torch.randn(n, 7, generator=g, dtype=torch.float64)
    return x.T @ x / len(x), w @ w.T


def error_without(readers: list[Reader], gone: list[int]) -> float:
    """tr G_RR (K_RR - K_RS K_SS^-1 K_SR), summed over the readers, with the ridge on K."""
    total = 0.0
    for covariance, gram in readers:
        k = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        r, s = torch.tensor(gone), torch.tensor([i for i in range(len(k)) if i not in gone], dtype=torch.long)
        rest = k[r][:, r] - (k[r][:, s] @ torch.linalg.solve(k[s][:, s], k[s][:, r]) if len(s) else 0)
        total += float((gram[r][:, r] * rest).sum())
    return total


def greedy(readers: list[Reader]) -> Tensor:
    n, gone, before, last = len(readers[0][0]), list[int](), 0.0, 0.0
    errors = torch.zeros(n, dtype=torch.float64)
    while len(gone) < n:
        now, k = min((error_without(readers, [*gone, k]), k) for k in range(n) if k not in gone)
        last = max(last, now - before)
        gone, before, errors[k] = [*gone, k], now, last
    return errors


@pytest.mark.parametrize(("n", "readers"), [(1, 1), (2, 1), (7, 3), (8, 1), (29, 2)])
def test_errors_equal_greedy_removal_from_scratch(n: int, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon, "BLOCK", 8)  # within a block, and beyond some
    given_ = [reader(n, seed) for seed in range(readers)]
    expected = greedy(given_)
    assert torch.allclose(removal_errors(given_), expected, rtol=1e-8, atol=1e-10 * float(expected.max()))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 300))
def test_one_pass_ranks_the_layer(seed: int, n: int) -> None:
    """Errors are finite and not negative; a channel that goes later never costs less."""
    readers = [reader(n, seed), reader(n, seed + 1, rows=max(2, n // 3))]  # the second from fewer images than channels
    errors = removal_errors(readers)
    assert torch.isfinite(errors).all() and (errors >= 0).all() and len(errors.unique()) > n // 2
    half = errors.argsort()[: n // 2].tolist()
    others = errors.argsort()[-len(half) :].tolist()
    if half:
        assert error_without(readers, half) <= error_without(readers, others)


def test_a_mix_of_several_others_goes_before_any_lone_channel() -> None:
    """No comparison of pairs finds it: at 0.7 of the correlation with either."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=g, dtype=torch.float64)
    x[:, 5] = x[:, 1] - x[:, 2]
    x[:, 7] = 0
    gram = torch.eye(8, dtype=torch.float64)
    order = removal_errors([(x.T @ x / len(x), gram)]).argsort(stable=True).tolist()
    assert order[0] == 7 and order[1] in (1, 2, 5)


def test_dead_readers_and_dead_channels_are_ranked_without_nan() -> None:
    zero, (k, g) = torch.zeros(12, 12, dtype=torch.float64), reader(12, 0)
    for readers in ([(zero, zero)], [(zero, g)], [(k, zero)], [(k, g), (zero, zero)], [(torch.ones_like(k), g)]):
        assert torch.isfinite(removal_errors(readers)).all()


# ---- measured on networks


@pytest.mark.parametrize("net", PRUNABLE)
def test_every_network_has_covariances_of_every_group(net: str) -> None:
    model, x = randomised(PRUNABLE[net]()), images(8)
    graph = analyse(model, x[:1])
    found = covariances(model, graph, x.split(3))
    assert set(found) == {g.name for g in graph.groups if not g.locked}
    for name, c in describe(model, graph, covariances=found).items():
        assert c.readers is not None and len(c.readers) == len(found[name])
        assert all(k.shape == g.shape == (graph[name].channels,) * 2 and torch.isfinite(k).all() for k, g in c.readers)
        assert torch.isfinite(criteria.get("obs")(c)).all()
        read = torch.stack([g.diagonal() for _, g in c.readers]).sum(0)
        assert torch.allclose(read.sqrt().float(), c.outgoing, rtol=1e-5)


def test_covariances_are_those_of_what_the_readers_are_given() -> None:
    model, x = randomised(plain(12, 10)), images(6)
    graph = analyse(model, x[:1])
    found = covariances(model, graph, [x[:2], x[2:]])
    with torch.no_grad():
        seen = model[:3](x).movedim(1, -1).flatten(0, -2)
        last = model[:8](x)
    assert torch.allclose(found["0"][0], torch.cov(seen.T, correction=0))
    assert torch.allclose(found["3"][0], torch.cov(last.T, correction=0))


def test_behind_a_flatten_the_inputs_of_a_channel_are_pooled_each_about_its_own_mean() -> None:
    """A reader's bias takes the mean of every input, so that what varies over positions only costs nothing."""
    model, x = randomised(flattened()), images(6)
    with torch.no_grad():
        seen = model[:3](x).flatten(2)  # (N, 12, 16)
    expected = torch.stack([torch.cov(seen[:, :, p].T, correction=0) for p in range(16)]).mean(0)
    assert torch.allclose(covariances(model, analyse(model, x[:1]), x.split(4))["0"][0], expected)


@pytest.mark.parametrize("images_seen", [6, 120], ids=["fewer rows than channels", "more"])
def test_a_reader_that_gets_no_lost_mean_back_is_measured_about_zero(images_seen: int) -> None:
    """A channel that never varies is dear to a head without a bias, and costs nothing where there is one."""
    model, x = (
        randomised(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5))),
        images(images_seen),
    )
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 2.0
        seen = model[:4](x)

    def measured() -> tuple[Tensor, Tensor]:
        graph = analyse(model, x[:1])
        found = covariances(model, graph, x.split(4))
        return found["0"][0], removal_errors(list(describe(model, graph, covariances=found)["0"].readers or ()))

    with_bias, errors = measured()
    assert torch.allclose(with_bias, torch.cov(seen.T, correction=0)) and errors[0] < 1e-3 * errors.max()
    model[4].bias = None
    without, errors = measured()
    assert torch.allclose(without, seen.T @ seen / len(seen)) and errors.argmax() == 0


@pytest.mark.parametrize("rows", [4, 40], ids=["fewer than channels", "more"])
def test_columns_of_a_channel_are_pooled_whether_rows_or_products_are_kept(rows: int) -> None:
    x = torch.randn(rows, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(3)[:, None]
    moments = Moments(-1)
    for part in x.split(3):
        moments.add_rows(part)
    assert (moments.products is None) == (rows == 4)
    assert torch.allclose(moments.covariance, torch.stack([torch.cov(column.T, correction=0) for column in x.unbind(1)]).mean(0))


def test_a_layer_that_is_called_by_keyword_is_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.then, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.then(input=self.first(x).relu()).relu().mean((2, 3)))

    model, x = randomised(ByKeyword()), images(4)
    with torch.no_grad():
        seen = model.first(x).relu().movedim(1, -1).flatten(0, -2)
    assert torch.allclose(covariances(model, analyse(model, x[:1]), [x])["first"][0], torch.cov(seen.T, correction=0))


def test_a_layer_whose_variance_lies_in_a_few_channels_is_ranked() -> None:
    """Products of float32 rows are off by more than the ridge there, and the covariance is not positive definite."""
    g = torch.Generator().manual_seed(0)
    k, gram = reader(40, 0)
    off = torch.randn(40, 40, generator=g, dtype=torch.float64)
    k = k * 1e-6
    k[0, 0] = 1.0
    k -= 1e-2 * torch.eye(40, dtype=torch.float64) + 1e-9 * (off + off.T)
    assert float(torch.linalg.eigvalsh(k)[0]) < -RIDGE * float(k.diagonal().mean())
    errors = removal_errors([(k, gram)])
    assert torch.isfinite(errors).all() and errors.argmax() == 0


def test_the_error_is_what_the_reader_loses_after_the_repair() -> None:
    """The claim itself: removed by these scores and repaired, a reader's output is off by their sum, but for the ridge's share."""
    model, x = randomised(plain(20, 10)), images(64)
    with torch.no_grad():
        model[0].weight[10:] = model[0].weight[:10] + 0.5 * model[0].weight[10:]  # what copies leave would be the ridge
    model[3] = nn.Conv2d(20, 10, 1, bias=False).double()  # a 1 x 1 reader, whose output is a sum over channels only
    graph = analyse(model, x[:1])
    errors = removal_errors(list(describe(model, graph, covariances=covariances(model, graph, [x]))["0"].readers or ()))
    gone = errors.argsort()[:8].tolist()
    with torch.no_grad():
        inputs, before = model[:3](x), model[:4](x)
        reconstruct_(model, graph, {"0": gone}, [x])
        inputs[:, gone] = 0
        lost = (model[3](inputs) - before).movedim(1, -1).flatten(0, -2)
    claimed = float(errors[gone].sum())
    assert float(lost.var(0, correction=0).sum()) == pytest.approx(claimed, rel=0.05)


def test_activations_that_are_not_finite_are_refused() -> None:
    model, x = randomised(plain(12, 10)), images(4)
    graph = analyse(model, x[:1])
    found = covariances(model, graph, [x * float("nan")])
    with pytest.raises(VerificationFailed, match="readers' inputs are not finite"):
        describe(model, graph, covariances=found)
    with pytest.raises(VerificationFailed, match="cannot be ranked"):
        removal_errors([(found["0"][0], torch.eye(12, dtype=torch.float64))])
