"""Batch-norm statistics estimated anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunectl.pruning.recalibrate import recalibrate_


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
    ).eval()


def batches(sizes: tuple[int, ...] = (8, 8, 8)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 2, 6, 6) + 3 for n in sizes]


def test_the_first_norm_gets_the_mean_of_the_batches_statistics() -> None:
    model = net()
    expected = torch.stack([model[0](x).mean((0, 2, 3)) for x in batches()]).mean(0)
    variance = torch.stack([model[0](x).var((0, 2, 3)) for x in batches()]).mean(0)
    assert recalibrate_(model, batches()) == 24
    torch.testing.assert_close(model[1].running_mean, expected)  # float32 sums in another order
    torch.testing.assert_close(model[1].running_var, variance)


def test_modes_momentum_and_weights_stay() -> None:
    model = net()
    model[1].train()
    weights = [p.clone() for p in model.parameters()]
    recalibrate_(model, batches())
    assert [m.training for m in model] == [False, True, False, False, False, False]
    assert model[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_the_old_statistics_do_not_matter() -> None:
    first, second = net(), net()
    second[1].running_mean.fill_(100.0)
    recalibrate_(first, batches())
    recalibrate_(second, batches())
    assert torch.equal(first[1].running_mean, second[1].running_mean)


@pytest.mark.parametrize("sizes", [(), (1,)])
def test_too_few_images_leave_the_statistics_as_they_were(sizes: tuple[int, ...]) -> None:
    model = net()
    before = model[1].running_var.clone()
    assert recalibrate_(model, batches(sizes)) == 0
    assert torch.equal(model[1].running_var, before)


def test_an_error_on_the_way_restores_modes_and_momentum() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        recalibrate_(model, [torch.randn(4, 3, 6, 6)])  # three channels where two are expected
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_a_short_batch_weighs_what_it_holds() -> None:
    model, parts = net(), batches((40, 40, 2))
    recalibrate_(model, parts)
    weights = torch.tensor([40.0, 40.0, 2.0]) / 82
    variance = torch.stack([model[0](x).var((0, 2, 3)) for x in parts])
    torch.testing.assert_close(model[1].running_var, (weights[:, None] * variance).sum(0))


def test_a_norm_may_be_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(input=x)

    batches = [torch.rand(4, 3, 8, 8), torch.rand(2, 3, 8, 8)]
    named, plain = Named(), nn.BatchNorm2d(3)
    assert recalibrate_(named, batches) == recalibrate_(plain, batches) == 6
    assert torch.equal(named.norm.running_mean, plain.running_mean)


def test_a_norm_that_is_called_twice_averages_both() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(norm, nn.Conv2d(2, 2, 1), norm).eval()
    recalibrate_(model, [x := torch.randn(8, 2, 5, 5) + 3])
    first = torch.nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm.running_mean, (x.mean((0, 2, 3)) + model[1](first).mean((0, 2, 3))) / 2)


class _Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var)


@pytest.mark.parametrize("layer", [_Frozen(3), _Functional()])
def test_statistics_that_no_pass_renews_stay(layer: nn.Module) -> None:
    """A norm that never trains, and one whose statistics the network's code reads without calling it."""
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    norm = next(m for m in layer.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.fill_(0.7)  # type: ignore[union-attr]
    assert recalibrate_(model, [torch.rand(4, 3, 5, 5)]) == 4
    assert norm.running_mean.eq(0.7).all() and not model[1].running_mean.eq(0).any()  # type: ignore[union-attr]
