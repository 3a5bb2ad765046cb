"""Removed channels' outgoing weights given to the surviving near-copy of each: a repair that needs no training.

relu(c z) = c relu(z) for c > 0. So where unit k is parallel to a survivor s, W_next[:, s] += c W_next[:, k] with
c = |w_k| / |w_s| of the folded filters loses nothing. For units at an angle theta the share of k's output that s can
stand in for is, for Gaussian inputs, the correlation of two rectified variables,

    kappa(theta) = (sin theta + (pi - theta) cos theta - 1) / (pi - 1),

1 for a copy and 0 at a right angle (Cho & Saul 2009 give the moments; means are left to the batch-norm
re-calibration). The idea of compensating in the next layer is Neuron Merging's (Kim et al., NeurIPS 2020), which uses
c alone. A unit that is constant gives its value to its readers' biases: exactly, but for a convolution's padded borders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunectl.pruning.channels import Channels, describe
from prunectl.pruning.spline import signed_distances
from prunectl.pruning.surgery import Graph, Group


def merge_(model: nn.Module, graph: Graph, dropped: Mapping[str, Sequence[int]], *, rho: float = 0.05) -> dict[str, int]:
    """Adds each dropped channel's outgoing weights to its nearest same-sign survivor; works after any criterion.

    Only groups in `graph.plain` are touched: elsewhere a channel's readers do not scale with it. The dropped channels
    themselves are left for `compact`. Returns group -> number of channels merged."""
    merged = {}
    views = describe(model, graph, rho=rho)
    for name in sorted(graph.plain & dropped.keys() & views.keys()):
        channels, gone = views[name], torch.tensor(sorted(dropped[name]), dtype=torch.long)
        target, share = stand_ins(channels, dropped[name], rho=rho)
        constant = gone[channels.filters[gone].norm(dim=1) == 0]
        _settle(model, graph[name], constant, channels.bias[constant].relu())
        useful = share > 0
        if useful.any():
            _give(model, graph[name], gone[useful], target[useful], share[useful])
        merged[name] = int(useful.sum())
    return merged


def stand_ins(channels: Channels, dropped: Sequence[int], *, rho: float = 0.05) -> tuple[Tensor, Tensor]:
    """For each dropped unit, in ascending order, the nearest survivor and the factor for its outgoing weights (0: none)."""
    gone = torch.tensor(sorted(dropped), dtype=torch.long)
    stays = torch.ones(len(channels.bias), dtype=torch.bool)
    stays[gone] = False
    survivors = stays.nonzero().flatten()
    norm = channels.filters.double().norm(dim=1)
    nearest = signed_distances(channels.filters, channels.bias, rho=rho)[gone][:, survivors].argmin(1)
    target = survivors[nearest]
    product = (channels.filters[gone].double() * channels.filters[target].double()).sum(1)
    alive = (norm[gone] > 0) & (norm[target] > 0)
    cosine = torch.where(alive, product / (norm[gone] * norm[target]).clamp(min=1e-300), 0.0).clamp(-1, 1)
    theta = cosine.acos()
    kappa = (theta.sin() + (math.pi - theta) * cosine - 1) / (math.pi - 1)
    return target, torch.where(alive & (cosine > 0), kappa * norm[gone] / norm[target].clamp(min=1e-300), 0.0)


@torch.no_grad()
def _give(model: nn.Module, group: Group, gone: Tensor, target: Tensor, share: Tensor) -> None:
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if member.out or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        columns = _columns_by_root(member.index, member.root, group.channels).to(layer.weight.device)
        weight = layer.weight.data
        factor = share.to(weight).repeat_interleave(columns.shape[1]).view(1, -1, *[1] * (weight.dim() - 2))
        weight.index_add_(1, columns[target].flatten(), weight[:, columns[gone].flatten()] * factor)


@torch.no_grad()
def _settle(model: nn.Module, group: Group, constant: Tensor, value: Tensor) -> None:
    """Adds what units of constant output give to their readers to the biases of those."""
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if member.out or not isinstance(layer, nn.Conv2d | nn.Linear) or layer.bias is None:
            continue
        columns = _columns_by_root(member.index, member.root, group.channels).to(layer.weight.device)
        per_unit = layer.weight[:, columns[constant]].flatten(2).sum(2)
        layer.bias.data += per_unit @ value.to(layer.weight)


def _columns_by_root(index: Sequence[int], root: Sequence[int], channels: int) -> Tensor:
    """(channels, m): the m inputs of a reader that belong to each channel, in ascending order."""
    pairs = sorted(zip(root, index, strict=True))
    return torch.tensor([i for _, i in pairs]).view(channels, -1)
