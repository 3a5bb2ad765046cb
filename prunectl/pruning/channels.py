"""What a criterion may know of one group of coupled channels: filters, biases, scales and readers, one row a channel.

Coupled layers stand side by side: a channel's filter is the concatenation of every producer's filter row, so that Gram
matrices and squared norms add over producers, and identity shortcuts contribute nothing. Batch norm in eval mode is
affine, so it is folded into the filter it follows. Where a residual stream is normalised only by its readers
(pre-activation nets), no single hyperplane exists: each producer takes the mean scale of the reading batch norms."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunectl.pruning.surgery import Graph, Group, Member


@dataclass(frozen=True)
class Channels:
    """C coupled channels, float32 on the CPU.

    filters (C, D), bias (C,): batch norm folded in; the hyperplane that a ReLU behind it sees.
    weights (C, D): the same filters as they are stored. gammas (C, B): |scale| of the group's batch norms, B may be 0.
    outgoing (C,): L2 norm of all weights that read the channel. gradients (C, D): of the loss by `weights`, or None.
    rho: weight of the bias term in the spline criterion. seed: for criteria that draw."""

    name: str
    filters: Tensor
    bias: Tensor
    weights: Tensor
    gammas: Tensor
    outgoing: Tensor
    gradients: Tensor | None
    rho: float
    seed: int


def describe(
    model: nn.Module, graph: Graph, *, rho: float = 0.05, seed: int = 0, gradients: Mapping[str, Tensor] | None = None
) -> dict[str, Channels]:
    """Every unlocked group of `graph` by name. gradients: parameter name -> gradient, for criteria that use it."""
    return {g.name: _describe(model, graph, g, rho, seed, gradients) for g in graph.groups if not g.locked}


def _describe(model: nn.Module, graph: Graph, group: Group, rho: float, seed: int, gradients: Mapping[str, Tensor] | None) -> Channels:
    layers = {m.layer: model.get_submodule(m.layer) for m in group.members}
    producers = [m for m in group.members if m.out and isinstance(layers[m.layer], nn.Conv2d | nn.Linear)]
    norms = [m for m in group.members if isinstance(layers[m.layer], nn.modules.batchnorm._BatchNorm)]
    readers = [m for m in group.members if not m.out and isinstance(layers[m.layer], nn.Conv2d | nn.Linear)]
    own = {graph.norm_after[m.layer] for m in producers if m.layer in graph.norm_after}
    shared = [_affine(layers[m.layer]) for m in norms if m.layer not in own]
    shared_norms = [m for m in norms if m.layer not in own]
    zero, one = torch.zeros(group.channels), torch.ones(group.channels)
    shared_scale = sum((_by_root(group, m, s) for m, (s, _) in zip(shared_norms, shared, strict=True)), zero) / max(1, len(shared))
    shared_shift = sum((_by_root(group, m, t) for m, (_, t) in zip(shared_norms, shared, strict=True)), zero) / max(1, len(shared))
    filters, weights, grads, bias = [], [], [], zero.clone()
    for m in producers:
        layer = layers[m.layer]
        raw = _by_root(group, m, _rows(layer.weight))
        stored = _by_root(group, m, layer.bias.detach().float().cpu()) if layer.bias is not None else zero
        if m.layer in graph.norm_after:
            scale_of, shift_of = _affine(model.get_submodule(graph.norm_after[m.layer]))
            scale, shift = _by_root(group, m, scale_of), _by_root(group, m, shift_of)
        else:
            scale, shift = (shared_scale if shared else one), zero
        filters.append(raw * scale[:, None])
        bias += stored * scale + shift
        weights.append(raw)
        if gradients is not None:
            grads.append(_by_root(group, m, _rows(gradients[f"{m.layer}.weight"])))
    squares = sum((_by_root(group, m, _columns(layers[m.layer])).square().sum(1) for m in readers), zero)
    gammas = [_by_root(group, m, layers[m.layer].weight.detach().float().cpu()).abs() for m in norms if layers[m.layer].affine]
    return Channels(
        name=group.name,
        filters=torch.cat(filters, 1),
        bias=bias + shared_shift,
        weights=torch.cat(weights, 1),
        gammas=torch.stack(gammas, 1) if gammas else torch.zeros(group.channels, 0),
        outgoing=squares.sqrt(),
        gradients=torch.cat(grads, 1) if grads else None,
        rho=rho,
        seed=zlib.crc32(f"{seed}:{group.name}".encode()),
    )


def _rows(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu().flatten(1)


def _columns(layer: nn.Module) -> Tensor:
    """(inputs, ...) of a layer's weight."""
    return layer.weight.detach().float().cpu().transpose(0, 1).flatten(1)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that an eval-mode batch norm applies."""
    deviation = (norm.running_var + norm.eps).sqrt()
    gamma = norm.weight.detach() if norm.affine else torch.ones_like(deviation)
    beta = norm.bias.detach() if norm.affine else torch.zeros_like(deviation)
    scale = gamma / deviation
    return scale.float().cpu(), (beta - norm.running_mean * scale).float().cpu()


def _by_root(group: Group, member: Member, per_channel: Tensor) -> Tensor:
    """Entries of a layer's channels, in the order of the group's: (C,) or (C, m*D) where m layer channels make one.

    A vector with m entries a channel is averaged over them."""
    order = sorted(range(len(member.index)), key=lambda i: (member.root[i], member.index[i]))
    rows = per_channel[torch.tensor([member.index[i] for i in order])]
    if per_channel.dim() == 1:
        return rows.view(group.channels, -1).mean(1)
    return rows.reshape(group.channels, -1)
