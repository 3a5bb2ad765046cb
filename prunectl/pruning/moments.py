"""Means and covariances of what a network's layers read, over images and positions; no label, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from prunectl.pruning.modes import evaluating
from prunectl.pruning.surgery import Dense, Graph, Group, Member


class Moments:
    """Sums of rows and of their products, both less the first batch's mean.

    channels: the dimension that the columns lie in. Without that shift a variance far below the squared mean would drown in the
    rounding of the products. While there are fewer rows than channels, as behind a flatten, the rows themselves are kept:
    they are the smaller."""

    def __init__(self, channels: int) -> None:
        self.channels, self.count = channels, 0
        self.shift = self.sum = torch.empty(0)
        self.rows: list[Tensor] = []
        self.products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.movedim(self.channels, -1).flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not self.count:
            self.shift = rows.mean(0)
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.rows.append(rows)
        if self.products is not None or self.count > len(self.shift):
            if self.products is None:
                self.products = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64, device=x.device)
            with torch.autocast(x.device.type, enabled=False):  # products rounded to bfloat16 leave no covariance to solve with
                for r in self.rows:
                    self.products += r.T @ r
            self.rows = []

    @property
    def mean(self) -> Tensor:
        return self.shift + self.sum / self.count

    @property
    def centre(self) -> Tensor:
        """The mean, less the shift that sums and rows are taken from."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C) float64."""
        if self.products is None:
            rows = torch.cat(self.rows).double() - self.centre
            return rows.T @ rows / self.count
        return self.products / self.count - self.centre[:, None] * self.centre[None, :]


def readers(model: nn.Module, group: Group) -> list[tuple[Member, nn.Conv2d | nn.Linear]]:
    """The dense layers that read the group's channels, one entry for each place that they are read at."""
    layers = [(m, model.get_submodule(m.layer)) for m in group.members if not m.out]
    return [(m, layer) for m, layer in layers if isinstance(layer, Dense)]


def covariances(model: nn.Module, graph: Graph, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Unlocked group -> for each of its `readers`, (C, C) float64: how the channels vary together where they are read.

    batches: inputs (N, C, H, W) of the network, which runs in eval mode. The inputs of one channel, where a flatten made
    several of it, count as positions. A reader that never runs reads independent channels."""
    found: dict[str, list[Moments]] = {}
    feeds: dict[str, list[Callable[[Tensor], None]]] = {}
    for group in graph.groups:
        if not group.locked:
            found[group.name] = []
            for m, layer in readers(model, group):
                found[group.name].append(Moments(-1))
                order = torch.tensor([i for _, i in sorted(zip(m.root, m.index, strict=True))])
                dim = 1 if isinstance(layer, nn.Conv2d) else -1
                feeds.setdefault(m.layer, []).append(partial(_add_channels, found[group.name][-1], order, group.channels, dim))
    watch(model, {name: partial(_each, called) for name, called in feeds.items()}, batches)
    nothing = {g.name: torch.eye(g.channels, dtype=torch.float64) for g in graph.groups if not g.locked}
    return {name: [m.covariance if m.count else nothing[name] for m in moments] for name, moments in found.items()}


def watch(model: nn.Module, see: Mapping[str, Callable[[Tensor], None]], batches: Iterable[Tensor]) -> int:
    """Runs the network in eval mode; see[layer] is given each input of that layer. Returns the number of images."""
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, f=f: f(inputs[0])) for name, f in see.items()]
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


def _each(called: list[Callable[[Tensor], None]], x: Tensor) -> None:
    for f in called:
        f(x)


def _add_channels(moments: Moments, order: Tensor, channels: int, dim: int, x: Tensor) -> None:
    rows = x.index_select(dim, order.to(x.device)).movedim(dim, -1)
    moments.add(rows.unflatten(-1, (channels, -1)).movedim(-1, 0))
