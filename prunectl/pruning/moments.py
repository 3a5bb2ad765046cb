"""Means and covariances of what a network's layers read, over images and positions; no label, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating
from prunectl.pruning.surgery import Dense, Graph, Group, Member, Norm


class Moments:
    """Sums of rows and of their products, both less the first batch's mean.

    dim: the dimension that the channels lie in. Without that shift a variance far below the squared mean would drown in the
    rounding of the products. While there are fewer rows than channels, as behind a flatten, the rows themselves are kept:
    they are the smaller."""

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self.shift = self.sum = torch.empty(0)
        self.rows: list[Tensor] = []
        self.products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self.add_rows(x.movedim(self.dim, -1).flatten(0, -2))

    def add_rows(self, rows: Tensor) -> None:
        """rows: (N, C), or (N, M, C) where a channel has M columns, each about its own mean."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not self.count:
            self.shift = rows.mean(0)
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.rows.append(rows)
        channels = rows.shape[-1]
        columns = self.sum.numel() // channels
        if self.products is not None or self.count * columns > channels:
            if self.products is None:
                self.products = torch.zeros(channels, channels, dtype=torch.float64, device=rows.device)
            with torch.autocast(rows.device.type, enabled=False):  # products rounded to bfloat16 leave no covariance to solve with
                for r in (r.flatten(0, -2) for r in self.rows):
                    self.products += r.T @ r
            self.rows = []

    @property
    def mean(self) -> Tensor:
        return self.shift + self.centre

    @property
    def centre(self) -> Tensor:
        """The mean, less the shift that sums and rows are taken from."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C) float64, the mean over a channel's columns."""
        if self.products is None:
            rows = (torch.cat(self.rows).double() - self.centre).flatten(0, -2)
            return rows.T @ rows / len(rows)
        centre = self.centre.view(-1, len(self.products))
        return (self.products / self.count - centre.T @ centre) / len(centre)

    @property
    def about_zero(self) -> Tensor:
        """(C, C) float64, as `covariance`, of inputs with their means."""
        means = self.mean.view(-1, self.mean.shape[-1])
        return self.covariance + means.T @ means / len(means)


def readers(model: nn.Module, group: Group) -> list[tuple[Member, nn.Conv2d | nn.Linear]]:
    """The dense layers that read the group's channels, one entry for each place that they are read at."""
    layers = [(m, model.get_submodule(m.layer)) for m in group.members if not m.out]
    return [(m, layer) for m, layer in layers if isinstance(layer, Dense)]


def means_return(model: nn.Module, graph: Graph, layer: str) -> bool:
    """Whether the mean that a reader loses with its inputs can come back: through its own bias, or a batch norm behind it.

    Behind a convolution that may be a later one, behind the addition of a residual stream say."""
    module = model.get_submodule(layer)
    later = isinstance(module, nn.Conv2d) and any(isinstance(m, Norm) for m in model.modules())
    return layer in graph.norm_after or getattr(module, "bias", None) is not None or later


def covariances(model: nn.Module, graph: Graph, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Unlocked group -> for each of its `readers`, (C, C) float64: how the channels vary together where they are read, about their
    means, or about zero where no mean that is lost returns.

    batches: inputs (N, C, H, W) of the network, which runs in eval mode. The inputs of one channel, where a flatten made
    several of it, are pooled, each about its own mean or zero. A reader that never runs reads independent channels."""
    found: dict[str, list[_Pooled]] = {}
    feeds: dict[str, list[_Pooled]] = {}
    for group in graph.groups:
        if not group.locked:
            found[group.name] = [
                _Pooled(m, 1 if isinstance(layer, nn.Conv2d) else -1, group.channels, centred=means_return(model, graph, m.layer))
                for m, layer in readers(model, group)
            ]
            for pooled in found[group.name]:
                feeds.setdefault(pooled.layer, []).append(pooled)
    watch(model, {name: partial(_each, pooled) for name, pooled in feeds.items()}, batches)
    feeds.clear()
    return {name: [p.spread for p in found.pop(name)] for name in list(found)}  # sums of products are let go as they are used


class _Pooled(Moments):
    """Of a group's channels in what one layer is given, over images and positions."""

    def __init__(self, member: Member, dim: int, channels: int, *, centred: bool) -> None:
        super().__init__(dim)
        self.layer, self.channels, self.centred = member.layer, channels, centred
        self.order = torch.tensor([i for _, i in sorted(zip(member.root, member.index, strict=True))])

    def add(self, x: Tensor) -> None:
        rows = x.index_select(self.dim, self.order.to(x.device)).movedim(self.dim, -1).flatten(0, -2)
        self.add_rows(rows.unflatten(-1, (self.channels, -1)).transpose(1, 2))

    @property
    def spread(self) -> Tensor:
        if not self.count:
            return torch.eye(self.channels, dtype=torch.float64)
        return self.covariance if self.centred else self.about_zero


def watch(model: nn.Module, see: Mapping[str, Callable[[Tensor], None]], batches: Iterable[Tensor]) -> int:
    """Runs the network in eval mode; see[layer] is given each input of that layer. Returns the number of images."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, named, f=f: f(args[0] if args else named["input"]), with_kwargs=True
        )
        for name, f in see.items()
    ]
    seen = 0
    try:
        with evaluating(model), torch.no_grad():
            for x in batches:
                model(x)
                seen += len(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _each(pooled: list[_Pooled], x: Tensor) -> None:
    for p in pooled:
        p.add(x)
