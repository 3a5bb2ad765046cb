"""What a criterion may know of one group of coupled channels: filters, biases, scales and readers, one row a channel.

Coupled layers stand side by side: a channel's filter is the concatenation of every producer's filter row, so that Gram
matrices and squared norms add over producers, and identity shortcuts contribute nothing. Batch norm in eval mode is
affine, so it is folded into the filter it follows. Where a residual stream is normalised only by its readers
(pre-activation nets), no single hyperplane exists: each producer takes the mean scale of the reading batch norms. One behind
the ReLU (conv, ReLU, batch norm) leaves the hyperplane where the convolution put it, and is not folded. A depthwise convolution
gives its filter, since channels that it treats differently are no copies, but not its bias, which moves another hyperplane."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunectl.errors import VerificationFailed
from prunectl.pruning.moments import readers
from prunectl.pruning.surgery import Dense, Graph, Group, Member, Norm


@dataclass(frozen=True)
class Channels:
    """C coupled channels, float32 on the CPU.

    filters (C, D), bias (C,): batch norm folded in; the hyperplane that a ReLU behind it sees.
    weights (C, D): the same filters as they are stored. gammas (C, B): |scale| of the group's batch norms, B may be 0.
    scale (C,): how far the channel's values spread: the mean |scale| of its batch norms, or where it has none the norm of its filter.
    outgoing (C,): L2 norm of all weights that read the channel. gradients (C, D): of the loss by `weights`, or None.
    readers: for each layer that reads the channels, how they vary together there and the products of its weights, both (C, C)
    float64; or None. rho: weight of the bias term in the spline criterion. seed: for criteria that draw."""

    name: str
    filters: Tensor
    bias: Tensor
    weights: Tensor
    gammas: Tensor
    scale: Tensor
    outgoing: Tensor
    gradients: Tensor | None
    readers: tuple[tuple[Tensor, Tensor], ...] | None
    rho: float
    seed: int


def describe(
    model: nn.Module,
    graph: Graph,
    *,
    rho: float = 0.05,
    seed: int = 0,
    gradients: Mapping[str, Tensor] | None = None,
    covariances: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Channels]:
    """Every unlocked group of `graph` by name. For criteria that use them, gradients: parameter name -> gradient, and covariances,
    as `moments.covariances` gives them.

    Raises VerificationFailed when weights, statistics, gradients or covariances are not finite."""
    return {g.name: _finite(_describe(model, graph, g, rho, seed, gradients, covariances)) for g in graph.groups if not g.locked}


def _describe(
    model: nn.Module,
    graph: Graph,
    group: Group,
    rho: float,
    seed: int,
    gradients: Mapping[str, Tensor] | None,
    covariances: Mapping[str, Sequence[Tensor]] | None,
) -> Channels:
    layers = [(m, model.get_submodule(m.layer)) for m in group.members]
    producers = [(m, layer) for m, layer in layers if m.out and isinstance(layer, Dense)]
    norms = [(m, layer) for m, layer in layers if isinstance(layer, Norm)]
    weights = [_by_root(group, m, _rows(layer.weight)) for m, layer in producers]
    own = {m.layer: graph.norm_after[m.layer] for m, _ in producers if m.layer in graph.norm_after}
    affine = {m.layer: (_by_root(group, m, scale), _by_root(group, m, shift)) for m, norm in norms for scale, shift in [_affine(norm)]}
    zero = torch.zeros(group.channels)
    lone = [affine[m.layer] for m, _ in norms if m.layer not in {*own.values(), *graph.late}]
    shared = _mean(lone, default=(torch.ones(group.channels), zero))
    filters, bias = [], zero
    for (m, layer), raw in zip(producers, weights, strict=True):
        scale, shift = affine[own[m.layer]] if m.layer in own else (shared[0], zero)
        stored = _by_root(group, m, _plain(layer.bias)) if layer.bias is not None else zero
        filters.append(raw * scale[:, None])
        if getattr(layer, "groups", 1) == 1:  # a depthwise convolution comes after the sum, not into it
            bias = bias + stored * scale + shift
    if len(own) < len(producers):
        bias = bias + shared[1]
    columns = [_by_root(group, m, _columns(layer.weight)) for m, layer in readers(model, group)]
    spreads = [_by_root(group, m, _plain(norm.weight)).abs() if norm.affine else torch.ones(group.channels) for m, norm in norms]
    gammas = [spread for spread, (_, norm) in zip(spreads, norms, strict=True) if norm.affine]
    folded = torch.cat(filters, 1)
    return Channels(
        name=group.name,
        filters=folded,
        bias=bias,
        weights=torch.cat(weights, 1),
        gammas=torch.stack(gammas, 1) if gammas else torch.zeros(group.channels, 0),
        scale=torch.stack(spreads).mean(0) if spreads else folded.norm(dim=1),
        outgoing=torch.stack([zero, *(c.square().sum(1) for c in columns)]).sum(0).sqrt(),
        gradients=torch.cat([_by_root(group, m, _rows(gradients[f"{m.layer}.weight"])) for m, _ in producers], 1) if gradients else None,
        readers=_measured(columns, covariances[group.name]) if covariances is not None else None,
        rho=rho,
        seed=zlib.crc32(f"{seed}:{group.name}".encode()),
    )


def _measured(columns: Sequence[Tensor], covariances: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    grams = [w @ w.T for w in (c.double() for c in columns)]
    return tuple(zip((c.double().cpu() for c in covariances), grams, strict=True))


def _finite(c: Channels) -> Channels:
    for what, t in (
        ("weights or batch-norm statistics", c.filters),
        ("biases", c.bias),
        ("readers", c.outgoing),
        ("gradients", c.gradients),
        *(("readers' inputs", covariance) for covariance, _ in c.readers or ()),
    ):
        if t is not None and not bool(torch.isfinite(t).all()):
            raise VerificationFailed(
                f"the channels of {c.name} cannot be ranked: their {what} are not finite;"
                " go back to an earlier checkpoint and lower the learning rate"
            )
    return c


def _plain(t: Tensor) -> Tensor:
    return t.detach().float().cpu()


def _rows(weight: Tensor) -> Tensor:
    return _plain(weight).flatten(1)


def _columns(weight: Tensor) -> Tensor:
    """(inputs, ...) of a layer's weight."""
    return _plain(weight).transpose(0, 1).flatten(1)


def _mean(pairs: list[tuple[Tensor, Tensor]], *, default: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not pairs:
        return default
    return torch.stack([scale for scale, _ in pairs]).mean(0), torch.stack([shift for _, shift in pairs]).mean(0)


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that an eval-mode batch norm applies; one without statistics leaves unit variance and zero mean."""
    one = torch.ones(norm.num_features)
    mean = one * 0 if norm.running_mean is None else _plain(norm.running_mean)
    deviation = one if norm.running_var is None else (_plain(norm.running_var) + norm.eps).sqrt()
    gamma, beta = (_plain(norm.weight), _plain(norm.bias)) if norm.affine else (one, one * 0)
    return gamma / deviation, beta - mean * gamma / deviation


def _by_root(group: Group, member: Member, per_channel: Tensor) -> Tensor:
    """Entries of a layer's channels, in the order of the group's: (C,) or (C, m*D) where m layer channels make one.

    A vector with m entries a channel is averaged over them."""
    order = sorted(range(len(member.index)), key=lambda i: (member.root[i], member.index[i]))
    rows = per_channel[torch.tensor([member.index[i] for i in order])]
    if per_channel.dim() == 1:
        return rows.view(group.channels, -1).mean(1)
    return rows.reshape(group.channels, -1)
