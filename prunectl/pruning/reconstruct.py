"""Removed channels stood in for by a linear mix of all that stay, fitted on unlabelled training images.

Every reader of a group (a convolution or a linear layer) is given the mix of surviving inputs that is nearest, in the
least-squares sense over images and positions, to the inputs it loses: x_R ~ M x_S with M = C_RS (C_SS + ridge)^-1, so
W[:, S] += W[:, R] M. Means are left to the batch-norm re-calibration. One forward pass gives all covariances; no label,
no gradient. Unlike `merge` it asks nothing of the path between producer and reader, so residual streams and
concatenations are served too. The reconstruction of He et al. (ICCV 2017) solves for whole kernels layer by layer;
here one mix serves all kernel positions, which is exact where the lost channel is such a mix, and costs one C x C solve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating
from prunectl.pruning.surgery import Graph

RIDGE = 1e-3  # of the mean variance: keeps the solve well-posed where channels are dead or copies of each other


def reconstruct_(model: nn.Module, graph: Graph, dropped: Mapping[str, Sequence[int]], batches: Iterable[Tensor]) -> int:
    """Gives every reader's lost inputs to its surviving ones; the lost columns are left for `compact` to remove.

    batches: inputs (N, C, H, W) of the network, which runs in eval mode. Returns the number of images seen."""
    lost = _lost_inputs(model, graph, dropped)
    moments = {name: _Moments() for name in lost}
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, m=m: m.add(inputs[0])) for name, m in moments.items()]
    seen = 0
    try:
        with evaluating(model), torch.no_grad():
            for x in batches:
                model(x)
                seen += len(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, gone in lost.items():
        if moments[name].count:
            _stand_in(model.get_submodule(name), gone, moments[name].covariance())
    return seen


class _Moments:
    """Sums of a layer's inputs and of their products over images and positions, both less the first batch's mean.

    Without that shift a variance far below the squared mean would drown in the rounding of the products."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.sum = self.products = torch.empty(0)

    def add(self, x: Tensor) -> None:
        rows = (x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2)  # a convolution's channels come second, a linear layer's last
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not self.count:
            self.shift = rows.mean(0)
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
            self.products = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64, device=x.device)
        rows = rows - self.shift
        self.count += len(rows)
        self.products += rows.T @ rows
        self.sum += rows.sum(0)

    def covariance(self) -> Tensor:
        mean = self.sum / self.count
        return self.products / self.count - mean[:, None] * mean[None, :]


@torch.no_grad()
def _stand_in(layer: nn.Module, gone: list[int], covariance: Tensor) -> None:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight = layer.weight.data
    stays = torch.ones(weight.shape[1], dtype=torch.bool, device=covariance.device)
    lost = torch.tensor(gone, device=covariance.device)
    stays[lost] = False
    kept = stays.nonzero().flatten()
    within = covariance[kept][:, kept]
    ridge = RIDGE * within.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    system = within + ridge * torch.eye(len(kept), dtype=within.dtype, device=within.device)
    mix = torch.linalg.solve(system, covariance[kept][:, lost]).to(weight)  # (S, R): M transposed
    weight[:, kept] += torch.einsum("or...,sr->os...", weight[:, lost], mix)


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
