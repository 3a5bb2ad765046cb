"""What criteria see of a group, against fused layers and plain sums."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pruning_nets import PRUNABLE, Dense, Depthwise, PreActivation, Residual, SelfConcatenated, images, plain, randomised
from torch import Tensor, nn

from prunectl.errors import VerificationFailed
from prunectl.pruning.channels import Channels, describe
from prunectl.pruning.surgery import analyse

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}  # the views are float32, sums of a few hundred terms of order one
NETS = {**PRUNABLE, "self_concatenated": SelfConcatenated}


def views(model: nn.Module, **settings: object) -> dict[str, Channels]:
    return describe(model, analyse(model, images(1)), **settings)  # type: ignore[arg-type]


def fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    layer = nn.utils.fusion.fuse_conv_bn_eval(copy.deepcopy(conv), copy.deepcopy(norm))
    assert layer.bias is not None
    return layer.weight.detach().flatten(1).float(), layer.bias.detach().float()


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.float(), **FLOAT32)


def test_filters_and_bias_are_the_fused_convolutions() -> None:
    model = randomised(plain())
    found = views(model)
    for name, norm in (("0", 1), ("3", 4)):
        filters, bias = fused(model[int(name)], model[norm])
        assert close(found[name].filters, filters) and close(found[name].bias, bias)
        assert torch.equal(found[name].weights, model[int(name)].weight.detach().flatten(1).float())
        assert close(found[name].gammas, model[norm].weight.detach().abs()[:, None])
        assert close(found[name].scale, model[norm].weight.detach().abs())


def test_a_stream_has_the_filters_of_all_its_writers_side_by_side() -> None:
    """Gram matrices add over the writers, and so do the biases of what is summed before one ReLU."""
    model = randomised(Residual())
    c = views(model)["conv2"]
    parts = [fused(model.stem, model.norm), fused(model.conv2, model.norm2)]
    assert c.filters.shape == (16, 27 + 180)
    assert close(c.filters @ c.filters.T, sum(f @ f.T for f, _ in parts))
    assert close(c.bias, parts[0][1] + parts[1][1])
    assert c.gammas.shape == (16, 2)
    assert close(c.scale, (model.norm.weight.abs() + model.norm2.weight.abs()).detach() / 2)


def test_a_preactivation_stream_takes_the_mean_of_its_readers_norms() -> None:
    model = randomised(PreActivation())
    c = views(model)["stem"]
    scales, shifts = [], []
    for norm in (model.norm1, model.norm):
        scales.append(norm.weight / (norm.running_var + norm.eps).sqrt())
        shifts.append(norm.bias - norm.running_mean * scales[-1])
    scale, shift = (scales[0] + scales[1]) / 2, (shifts[0] + shifts[1]) / 2
    gram = sum((w.flatten(1) * scale[:, None]) @ (w.flatten(1) * scale[:, None]).T for w in (model.stem.weight, model.conv2.weight))
    assert close(c.filters @ c.filters.T, gram.detach())
    assert close(c.bias, shift.detach())


def test_a_normed_stem_is_not_shifted_by_the_norms_of_its_readers() -> None:
    """The ReLU right behind the stem sees the stem's own batch norm, whatever reads it later."""
    model = randomised(Dense())
    found = views(model)
    filters, bias = fused(model.stem, model.norm0)
    assert close(found["stem"].filters, filters) and close(found["stem"].bias, bias)
    scale = (model.norm2.weight / (model.norm2.running_var + model.norm2.eps).sqrt())[12:]
    assert close(found["conv1"].filters, (model.conv1.weight.flatten(1) * scale[:, None]).detach())
    assert close(found["conv1"].bias, (model.norm2.bias[12:] - model.norm2.running_mean[12:] * scale).detach())


def test_without_norms_the_stored_weights_and_biases_are_the_hyperplane() -> None:
    model = randomised(PRUNABLE["flattened"]())
    c = views(model)["0"]
    assert torch.equal(c.filters, c.weights) and torch.equal(c.filters, model[0].weight.detach().flatten(1).float())
    assert torch.equal(c.bias, model[0].bias.detach().float())
    assert c.gammas.shape == (12, 0) and close(c.scale, c.filters.norm(dim=1))


LATE = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "hardswish": nn.Hardswish(),
    "tanh": nn.Tanh(),
    "pooled": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("activation", LATE.values(), ids=LATE)
def test_a_norm_behind_the_activation_moves_no_boundary(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), activation, nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = randomised(net.append(nn.Flatten()).append(nn.Linear(8, 4)))
    c = views(model)["0"]
    assert torch.equal(c.filters, model[0].weight.detach().flatten(1).float()) and torch.equal(c.bias, model[0].bias.detach().float())
    assert c.gammas.shape == (16, 1)


def test_a_norm_without_statistics_or_scale() -> None:
    norms = nn.BatchNorm2d(16, track_running_stats=False), nn.BatchNorm2d(12, affine=False)
    layers = [nn.Conv2d(3, 16, 3), norms[0], nn.ReLU(), nn.Conv2d(16, 12, 3), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)]
    model = randomised(nn.Sequential(*layers))
    found = views(model)
    assert close(found["0"].filters, (found["0"].weights * norms[0].weight.detach().float()[:, None]))
    deviation = (norms[1].running_var + norms[1].eps).sqrt().float()  # type: ignore[operator]
    assert close(found["3"].filters, found["3"].weights / deviation[:, None])
    assert found["3"].gammas.shape == (12, 0) and found["3"].scale.tolist() == [1.0] * 12


@pytest.mark.parametrize("net", NETS)
def test_outgoing_is_the_norm_of_every_weight_that_reads_the_channel(net: str) -> None:
    """The oracle zeroes a channel's readers one weight at a time, by the group's own numbering."""
    model = randomised(NETS[net]())
    graph = analyse(model, images(1))
    for name, c in describe(model, graph).items():
        squares = np.zeros(graph[name].channels)
        for m in graph[name].members:
            layer = model.get_submodule(m.layer)
            if not m.out and isinstance(layer, nn.Conv2d | nn.Linear):
                for i, r in zip(m.index, m.root, strict=True):
                    squares[r] += float(layer.weight.detach()[:, i].square().sum())
        assert close(c.outgoing, torch.tensor(np.sqrt(squares))), name
        assert (c.outgoing > 0).all()


@pytest.mark.parametrize("net", NETS)
def test_views_are_float32_on_the_cpu_finite_and_as_wide_as_their_group(net: str) -> None:
    model = randomised(NETS[net]())
    graph = analyse(model, images(1))
    found = describe(model, graph)
    assert list(found) == [g.name for g in graph.groups if not g.locked]
    for name, c in found.items():
        for t in (c.filters, c.bias, c.weights, c.gammas, c.scale, c.outgoing):
            assert len(t) == graph[name].channels and t.dtype == torch.float32 and torch.isfinite(t).all() and not t.requires_grad
        assert c.filters.shape == c.weights.shape and c.gradients is None


def test_gradients_stand_where_their_weights_stand() -> None:
    model = randomised(Depthwise())
    model(images()).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for c in views(model, gradients=gradients).values():
        assert c.gradients is not None and c.gradients.shape == c.weights.shape
    same = {n: p.detach() for n, p in model.named_parameters()}
    for c in views(model, gradients=same).values():
        assert c.gradients is not None and torch.equal(c.gradients, c.weights)


def test_the_seed_is_of_the_run_and_the_group() -> None:
    model = randomised(plain())
    seeds = {(s, n): c.seed for s in (0, 1) for n, c in views(model, seed=s).items()}
    assert len(set(seeds.values())) == 4
    assert {n: c.seed for n, c in views(model, seed=1).items()} == {n: v for (s, n), v in seeds.items() if s == 1}


@pytest.mark.parametrize(
    ("layer", "tensor", "what"),
    [
        ("conv1", "weight", "weights or batch-norm statistics"),
        ("norm1", "running_var", "weights or batch-norm"),
        ("norm1", "bias", "biases"),
        ("fc", "weight", "readers"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_is_not_finite_is_refused_in_one_sentence(layer: str, tensor: str, what: str, value: float) -> None:
    model = randomised(Residual())
    graph = analyse(model, images(1))
    if tensor == "running_var" and value == torch.inf:
        value = torch.nan  # an infinite variance only scales to zero
    getattr(model.get_submodule(layer), tensor).data.flatten()[3] = value
    with pytest.raises(VerificationFailed, match=f"cannot be ranked: their {what}.* not finite; go back"):
        describe(model, graph)


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = randomised(plain())
    gradients = {n: torch.full_like(p, torch.nan) for n, p in model.named_parameters()}
    with pytest.raises(VerificationFailed, match="their gradients are not finite"):
        views(model, gradients=gradients)
