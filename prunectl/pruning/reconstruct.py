"""Removed channels stood in for by a linear mix of all that stay, fitted on unlabelled training images.

Every reader of a group (a convolution or a linear layer) is given the mix of surviving inputs that is nearest, in the
least-squares sense over images and positions, to the inputs it loses: x_R ~ M x_S with M = C_RS (C_SS + ridge)^-1, so
W[:, S] += W[:, R] M. Where batch norm follows the reader, its re-calibration absorbs the mean that is lost; elsewhere the
reader's bias takes it, and where there is neither, the mix is fitted to the inputs with their means (C + m m'). One
forward pass gives all covariances; no label, no gradient. Unlike `merge` it asks nothing of the path between producer
and reader, so residual streams and concatenations are served too. The reconstruction of He et al. (ICCV 2017) solves
for whole kernels layer by layer; here one mix serves all kernel positions, which is exact where the lost channel is
such a mix, and costs one solve of as many unknowns as there are channels, or images where these are fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunectl.pruning.moments import Moments, means_return, watch
from prunectl.pruning.surgeon import RIDGE
from prunectl.pruning.surgery import Graph

_TINY = torch.finfo(torch.float64).tiny


def reconstruct_(model: nn.Module, graph: Graph, dropped: Mapping[str, Sequence[int]], batches: Iterable[Tensor]) -> int:
    """Gives every reader's lost inputs to its surviving ones; the lost columns are left for `compact` to remove.

    batches: inputs (N, C, H, W) of the network, which runs in eval mode. Returns the number of images seen."""
    lost = _lost_inputs(model, graph, dropped)
    moments = {name: Moments(1 if isinstance(model.get_submodule(name), nn.Conv2d) else -1) for name in lost}
    seen = watch(model, {name: m.add for name, m in moments.items()}, batches)
    for name, gone in lost.items():
        if moments[name].count:
            mean, centred = name not in graph.norm_after, means_return(model, graph, name)
            _stand_in(model.get_submodule(name), gone, moments[name], mean=mean, centred=centred)
    return seen


def _mixed(moments: Moments, weight: Tensor, kept: Tensor, lost: Tensor, *, centred: bool) -> Tensor:
    """(O, S, ...): weight (O, R, ...) of the lost inputs, given to the kept ones. centred: fitted to inputs less their means."""
    if moments.products is None:
        x = torch.cat(moments.rows).double() + (-moments.centre if centred else moments.shift)
        s, r = x[:, kept], x[:, lost]
        ridge = RIDGE * s.square().mean().clamp(min=_TINY) * moments.count
        system = s @ s.T + ridge * torch.eye(len(x), dtype=x.dtype, device=x.device)
        answers = torch.linalg.solve(system, torch.einsum("or...,nr->no...", weight, r).flatten(1))
        return torch.einsum("no...,ns->os...", answers.view(len(x), weight.shape[0], *weight.shape[2:]), s)
    covariance = moments.covariance if centred else moments.about_zero
    within = covariance[kept][:, kept]
    ridge = RIDGE * within.diagonal().mean().clamp(min=_TINY)
    system = within + ridge * torch.eye(len(kept), dtype=within.dtype, device=within.device)
    mix = torch.linalg.solve(system, covariance[kept][:, lost])  # (S, R): M transposed
    return torch.einsum("or...,sr->os...", weight, mix)


@torch.no_grad()
def _stand_in(layer: nn.Module, gone: list[int], moments: Moments, *, mean: bool, centred: bool) -> None:
    """mean: the layer's bias, if it has one, takes what the lost inputs' means are no longer there to give. centred: see `_mixed`."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight, device = layer.weight.data, moments.sum.device
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=device)
    lost = torch.tensor(gone, device=device)
    stays[lost] = False
    kept = stays.nonzero().flatten()
    with torch.autocast(device.type, enabled=False):
        old = weight[:, lost].double()
        try:
            new = _mixed(moments, old, kept, lost, centred=centred)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # activations that hardly vary at all
            return
        if not new.isfinite().all():
            return  # activations out of range: better the weights as they are
        weight[:, kept] += new.to(weight)
        if mean and layer.bias is not None:
            bias = old.flatten(2).sum(2) if old.dim() > 2 else old
            given = new.flatten(2).sum(2) if new.dim() > 2 else new
            layer.bias.data += (bias @ moments.mean[lost] - given @ moments.mean[kept]).to(layer.bias)


def _lost_inputs(model: nn.Module, graph: Graph, dropped: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Input channels that each dense reader loses, over all groups it reads."""
    lost: dict[str, set[int]] = {}
    for name, channels in dropped.items():
        gone = set(channels)
        for member in graph[name].members:
            layer = model.get_submodule(member.layer)
            if not member.out and isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "groups", 1) == 1:
                lost.setdefault(member.layer, set()).update(i for i, r in zip(member.index, member.root, strict=True) if r in gone)
    return {name: sorted(gone) for name, gone in lost.items() if gone}
