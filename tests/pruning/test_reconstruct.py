"""Surviving channels stand in for removed ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunectl import models
from prunectl.pruning.merge import merge_
from prunectl.pruning.moments import Moments
from prunectl.pruning.reconstruct import _mixed, reconstruct_
from prunectl.pruning.surgeon import RIDGE
from prunectl.pruning.surgery import analyse, compact

EXAMPLE = torch.zeros(1, 1, 28, 28, dtype=torch.float64)


def images(n: int = 32) -> Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network(name: str) -> nn.Module:
    model = models.build(name, num_classes=10, in_channels=1, image_size=28, width=0.5).double().eval()
    draw = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5, generator=draw)
            m.bias.data.uniform_(0, 1, generator=draw)
    return model


def copy_channel(model: nn.Module, layer: str, norm: str, source: int, target: int, factor: float) -> None:
    """Channel `target` of a convolution and its norm becomes `factor` times channel `source`."""
    conv, bn = model.get_submodule(layer), model.get_submodule(norm)
    conv.weight.data[target] = conv.weight.data[source]
    for t, f in ((bn.weight.data, factor), (bn.bias.data, factor), (bn.running_mean, 1.0), (bn.running_var, 1.0)):
        t[target] = t[source] * f


def test_merging_gives_a_constant_unit_to_the_bias_of_its_reader() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    model[0].weight.data[2], model[0].bias.data[2] = 0, 3
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    graph, expected = analyse(model, x[:1]), model(x)
    assert merge_(model, graph, {"0": []}) == {"0": 0} and torch.equal(model(x), expected)
    without = compact(model, {"0": [2]}, x[:1]).module(x)
    merge_(model, graph, {"0": [2]})
    assert (without - expected).abs().max() > 0.1, "the unit must have mattered"
    assert torch.allclose(compact(model, {"0": [2]}, x[:1]).module(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "vgg16"])
def test_a_scaled_copy_is_stood_in_for_exactly(name: str) -> None:
    model = network(name)
    graph = analyse(model, EXAMPLE)
    group = sorted(graph.plain)[0]
    copy_channel(model, group, graph.norm_after[group], source=1, target=3, factor=2.5)
    dropped = {group: [3]}
    expected = model(images())
    without = compact(model, dropped, EXAMPLE).module(images())
    merged, rebuilt = copy.deepcopy(model), copy.deepcopy(model)
    assert merge_(merged, graph, dropped) == {group: 1}
    reconstruct_(rebuilt, graph, dropped, [images()])
    scale = expected.abs().max()
    assert (without - expected).abs().max() / scale > 1e-3, "the dropped channel must have mattered"
    # merge computes its factor from float32 filters; reconstruction gives the ridge's share away
    assert (compact(merged, dropped, EXAMPLE).module(images()) - expected).abs().max() / scale < 1e-5
    assert (compact(rebuilt, dropped, EXAMPLE).module(images()) - expected).abs().max() / scale < 10 * RIDGE


@pytest.mark.parametrize("name", ["resnet8", "preresnet-20", "mobilenet-v2"])
def test_readers_come_nearer_to_what_they_computed(name: str) -> None:
    """The mix is the least-squares one, so on the images that it was fitted on no reader gets worse."""
    model = network(name)
    graph = analyse(model, EXAMPLE)
    free = [g for g in graph.groups if not g.locked]
    dropped = {g.name: list(range(0, g.channels, 3)) for g in free}
    rebuilt = copy.deepcopy(model)
    assert reconstruct_(rebuilt, graph, dropped, [images()]) == 32
    reader = next(m for m in free[-1].members if not m.out and isinstance(model.get_submodule(m.layer), nn.Conv2d | nn.Linear))
    inputs: list[Tensor] = []
    hook = model.get_submodule(reader.layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(images())
    hook.remove()
    gone = [i for i, r in zip(reader.index, reader.root, strict=True) if r in set(dropped[free[-1].name])]
    kept = inputs[0].clone()
    kept[:, gone] = 0
    old, new = model.get_submodule(reader.layer), rebuilt.get_submodule(reader.layer)

    def centred(t: Tensor) -> Tensor:
        return t - t.mean(tuple(i for i in range(t.dim()) if i != 1), keepdim=True)

    target = centred(old(inputs[0]))
    plain, repaired = (centred(layer(kept)) - target for layer in (old, new))
    assert repaired.norm() <= plain.norm() * (1 + 1e-6)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rows", [200, 40], ids=["more rows than channels", "fewer"])
def test_the_mix_is_the_ridge_solution_whichever_is_smaller(rows: int, centred: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 60, generator=draw, dtype=torch.float64) @ torch.randn(60, 60, generator=draw, dtype=torch.float64) + 5
    weight = torch.randn(7, 60, generator=draw, dtype=torch.float64)
    moments, lost, kept = Moments(-1), torch.arange(20), torch.arange(20, 60)
    for part in x.split(16):
        moments.add(part)
    about = x - x.mean(0)
    covariance = about.T @ about / rows
    assert torch.allclose(moments.mean, x.mean(0)) and torch.allclose(moments.covariance, covariance, rtol=1e-6)
    covariance = covariance if centred else x.T @ x / rows
    within = covariance[kept][:, kept]
    system = within + RIDGE * within.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = weight[:, lost] @ covariance[lost][:, kept] @ torch.linalg.inv(system)
    assert torch.allclose(_mixed(moments, weight[:, lost], kept, lost, centred=centred), expected, rtol=1e-6, atol=1e-8)


def test_half_precision_forward_passes_leave_the_mix_exact() -> None:
    """1024 inputs from 60: products rounded to bfloat16 are no covariance any more, and the solve explodes (10 times the output)."""
    draw = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(60, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw) / 8
    x, unseen = torch.randn(512, 60, generator=draw), torch.randn(500, 60, generator=draw)
    graph = analyse(model, x[:1])
    (group,) = (g for g in graph.groups if not g.locked and g.channels == 1024)
    dropped = {group.name: list(range(0, 1024, 2))}
    errors = []
    for half in (False, True):
        rebuilt = copy.deepcopy(model)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            reconstruct_(rebuilt, graph, dropped, x.split(256))
        with torch.no_grad():
            errors.append(float((compact(rebuilt, dropped, x[:1]).module(unseen) - model(unseen)).std()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_head_keeps_its_level_with_a_bias_or_without(bias: bool, norm: bool) -> None:
    """Half of what a head reads goes; what is left of its answers' mean error is small beside what is left of the rest."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, bias=bias), *([nn.BatchNorm2d(32)] if norm else []), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 5, bias=bias)).double().eval()
    x, unseen = torch.rand(256, 1, 8, 8).double(), torch.rand(256, 1, 8, 8).double()
    graph, expected = analyse(model, x[:1]), model(unseen)
    (group,) = (g for g in graph.groups if not g.locked)
    dropped = {group.name: list(range(16))}
    reconstruct_(model, graph, dropped, [x])
    error = compact(model, dropped, x[:1]).module(unseen) - expected
    assert error.mean(0).abs().max() < 0.01 * expected.abs().mean()  # fitted to centred inputs, a head without a bias is off by a tenth


def test_where_no_norm_follows_the_bias_takes_the_lost_means() -> None:
    """A unit that is always at 3 and one that never fires are gone without a trace."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()
    for unit, level in ((2, 3.0), (7, -1.0)):
        model[0].weight.data[unit], model[0].bias.data[unit] = 0, level
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    graph = analyse(model, x[:1])
    (group,) = (g for g in graph.groups if not g.locked)
    expected, dropped = model(x), {group.name: [2, 7]}
    reconstruct_(model, graph, dropped, [x])
    assert torch.allclose(compact(model, dropped, x[:1]).module(x), expected, atol=1e-9)


def test_nothing_but_readers_weights_changes() -> None:
    model = network("resnet8")
    graph = analyse(model, EXAMPLE)
    rebuilt = copy.deepcopy(model).train()
    reconstruct_(rebuilt, graph, {"layer1.0.conv1": [0, 1]}, [images()])
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, rebuilt.state_dict()[name])]
    assert changed == ["layer1.0.conv2.weight"], "no bias: batch norm follows"
    assert all(m.training for m in rebuilt.modules())
