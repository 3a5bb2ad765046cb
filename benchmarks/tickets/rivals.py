"""python -m benchmarks.tickets.rivals find-ticket ... --criterion tp-magnitude|tp-lamp: the tool, ranking by Torch-Pruning.

Torch-Pruning's own importances score its own groups, readers included; budget, surgery, repair and training are ours, so
that the rivals differ in the ranking alone and stand at the same MACs."""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor, nn

from prunectl.cli import main, training
from prunectl.pruning import ticket
from prunectl.pruning.channels import Channels
from prunectl.pruning.criteria import criteria
from prunectl.pruning.surgery import Graph, analyse

_traced: list[tuple[nn.Module, tp.DependencyGraph]] = []


def _analyse_twice(model: nn.Module, example: Tensor) -> Graph:
    """Our groups; Torch-Pruning's graph of the same network is kept for its importances, which read the modules."""
    _traced[:] = [(model, tp.DependencyGraph().build_dependency(model, example_inputs=example))]
    return analyse(model, example)


def _importance(kind: type[tp.importance.Importance], name: str) -> Tensor:
    model, graph = _traced[0]
    layer = model.get_submodule(name)
    prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    return kind()(graph.get_pruning_group(layer, prune, idxs=list(range(layer.weight.shape[0])))).detach().double().cpu()


@criteria.register
def tp_magnitude(c: Channels) -> Tensor:
    """Torch-Pruning's GroupMagnitudeImportance with its own defaults."""
    return _importance(tp.importance.GroupMagnitudeImportance, c.name)


@criteria.register
def tp_lamp(c: Channels) -> Tensor:
    """Torch-Pruning's LAMPImportance with its own defaults."""
    return _importance(tp.importance.LAMPImportance, c.name)


if __name__ == "__main__":
    ticket.analyse = _analyse_twice
    in_source = training.entries
    training.entries = lambda kind: {**in_source(kind), "tp-magnitude": "", "tp-lamp": ""}
    main()
