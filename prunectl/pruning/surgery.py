"""Channels taken out of a network for good; the only door to torch-pruning.

A `Graph` names the network's groups of coupled channels: layers whose outputs are added or concatenated lose the same
channels together. `compact` removes channels and also returns, for every tensor of the small network, where each of
its entries stood in the large one. That index is how weights, momentum and averages follow the surgery, and how a
masked network is made to test against.

Indices always refer to the numbering of the network that is passed in. torch-pruning accepts an index out of range,
keeps settings between calls and records history twice; so indices are checked here, every call gets fresh objects, and
only `get_pruning_group(...).prune()` is used."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from prunectl.errors import UsageError

Dropped = Mapping[str, Sequence[int]]
_HOMOGENEOUS = (
    "ReluBackward",
    "MaxPool2D",
    "AvgPool2D",
    "AdaptiveAvgPool2D",
    "MkldnnAdaptive",
    "MeanBackward",
    "ViewBackward",
    "ReshapeAlias",
)


@dataclass(frozen=True)
class Member:
    """One layer of a group: entry m of `index` is the layer's channel that belongs to the group's channel `root[m]`.

    `out`: the layer's outputs are the channels (a producer, a norm, a depthwise convolution), else its inputs."""

    layer: str
    out: bool
    index: tuple[int, ...]
    root: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """`channels` coupled channels, named after the layer that produces them; `locked` says why they cannot go."""

    name: str
    channels: int
    members: tuple[Member, ...]
    locked: str | None = None

    @property
    def producers(self) -> tuple[str, ...]:
        return tuple(m.layer for m in self.members if m.out)


@dataclass(frozen=True)
class Graph:
    """All groups of a network in the order of its layers, and the batch norm right behind each layer.

    plain: the groups with one producer whose channels reach every reader one by one, through nothing but ReLU, pooling
    and flattening, so that c times a channel is c times what its readers get (c > 0)."""

    groups: tuple[Group, ...]
    norm_after: Mapping[str, str]
    plain: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise UsageError(f"the network has no channel group '{name}'; its groups are {', '.join(g.name for g in self.groups)}")


@dataclass(frozen=True)
class Compacted:
    """A smaller network, and for each tensor of its state_dict the flat positions of its entries in the larger one's."""

    module: nn.Module
    index: dict[str, Tensor]


def analyse(model: nn.Module, example: Tensor) -> Graph:
    """The channel groups of `model`, found by tracing it once on `example` (1, C, H, W). The model is left as it was."""
    twin = copy.deepcopy(model).eval()
    graph = _trace(twin, example)
    names = {module: name for name, module in twin.named_modules()}
    order = {name: i for i, name in enumerate(names.values())}
    groups = [
        _group(graph, group, names, twin) for group in graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear])
    ]
    norms = {}
    for module, node in graph.module2node.items():
        followers = [n.module for n in node.outputs]
        if module in names and len(followers) == 1 and isinstance(followers[0], nn.BatchNorm2d | nn.BatchNorm1d):
            norms[names[module]] = names[followers[0]]
    plain = frozenset(g.name for g in groups if _is_plain(graph.module2node[twin.get_submodule(g.name)], is_producer=True))
    return Graph(tuple(sorted(groups, key=lambda g: order[g.name])), norms, plain)


def compact(model: nn.Module, dropped: Dropped, example: Tensor) -> Compacted:
    """`model` without the dropped channels, as a new module on the same device, with weights and modes carried over.

    dropped: group name -> channel numbers to remove. Raises UsageError for an unknown group, a number out of range or
    given twice, and for a group that would lose all its channels."""
    twin = copy.deepcopy(model).eval()
    graph = _trace(twin, example)
    layers = dict(twin.named_modules())
    _number_entries(twin)
    for name, channels in dropped.items():
        if len(channels) == 0:
            continue
        layer = layers.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise UsageError(f"the plan drops channels of '{name}', which is no convolution or linear layer of this network")
        indices = _checked(name, channels, layer.weight.shape[0])
        graph.get_pruning_group(layer, _out_pruner(graph, layer), idxs=indices).prune()
    index = {name: t.detach().round().long() for name, t in twin.state_dict().items()}
    state = carry(model.state_dict(), index)
    for name, t in _tensors(twin).items():
        t.data = state[name]
    for (_, small), (_, large) in zip(twin.named_modules(), model.named_modules(), strict=True):
        small.training = large.training
    for p, original in zip(twin.parameters(), model.parameters(), strict=True):
        p.requires_grad_(original.requires_grad)
        p.grad = None
    return Compacted(twin, index)


def carry(state: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the large network (weights, momentum, averages) cut to the small one's entries; same names, dtypes."""
    return {name: t.detach().flatten()[index[name].flatten().to(t.device)].view(index[name].shape) for name, t in state.items()}


def masked_state(state: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The large network's state with every weight entry that `compact` removed set to zero.

    Consumers then read nothing from a dropped channel, whatever batch norm and ReLU make of it in between, so that the
    large network computes what the small one does."""
    masked = {}
    for name, t in state.items():
        masked[name] = t.detach().clone()
        if t.dim() >= 2:
            keep = torch.zeros(t.numel(), dtype=torch.bool, device=t.device)
            keep[index[name].flatten().to(t.device)] = True
            masked[name].mul_(keep.view(t.shape))
    return masked


def replay(model: nn.Module, steps: Sequence[Dropped], example: Tensor) -> nn.Module:
    """`model` after each of `steps` in turn; every step numbers the channels of the network that it finds."""
    for dropped in steps:
        model = compact(model, dropped, example).module
    return model


def _trace(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    for p in model.parameters():
        p.requires_grad_(True)  # the tracer follows autograd
    like = next(model.parameters())
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example.to(like.device, like.dtype), verbose=False)


def _group(graph: tp.DependencyGraph, found: tp.Group, names: dict[nn.Module, str], model: nn.Module) -> Group:
    root = found[0].dep.target.module
    members, locked = [], None
    for item in found:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if module not in names:
            locked = locked or _foreign(module)
            continue
        roots = getattr(item, "root_idxs", item.idxs)
        if any(r is None for r in roots) or isinstance(module, nn.MultiheadAttention):
            locked = f"{names[module]} is an attention layer"
            continue
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.out_channels:
            locked = f"{names[module]} is a grouped convolution ({module.groups} groups)"
        members.append(Member(names[module], out, tuple(item.idxs), tuple(roots)))
    members = _without_repeats(members)
    if not any(_consumes(m, model) for m in members):
        locked = locked or "nothing inside the network reads them: they are its outputs"
    return Group(names[root], root.weight.shape[0], tuple(members), locked)


def _is_plain(node: tp.dependency.Node, *, is_producer: bool = False) -> bool:
    """Whether all that follows `node` up to the next dense layers works channel by channel and scales with its input."""
    if not node.outputs:
        return False
    for after in node.outputs:
        module, operator = after.module, after.grad_fn.name() if after.grad_fn is not None else ""
        if isinstance(module, nn.Conv2d | nn.Linear):
            if getattr(module, "groups", 1) != 1:
                return False
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if not is_producer or len(node.outputs) != 1 or not _is_plain(after):
                return False
        elif not operator.startswith(_HOMOGENEOUS) or not _is_plain(after):
            return False
    return True


def _consumes(member: Member, model: nn.Module) -> bool:
    return not member.out and isinstance(model.get_submodule(member.layer), nn.Conv2d | nn.Linear)


def _without_repeats(members: list[Member]) -> list[Member]:
    """A batch norm or a depthwise convolution is listed once for its outputs and once for its inputs: the first stays."""
    seen: dict[tuple[str, tuple[int, ...]], Member] = {}
    for m in members:
        key = (m.layer, m.index)
        if key not in seen or (m.out and not seen[key].out):
            seen[key] = m
    return list(seen.values())


def _foreign(module: nn.Module) -> str | None:
    """torch-pruning's own stand-ins for add, cat, reshape; a bare parameter on the path is beyond plain channel removal."""
    return None if type(module).__module__.startswith("torch_pruning") else f"{type(module).__name__} reads them"


def _out_pruner(graph: tp.DependencyGraph, layer: nn.Module) -> object:
    return graph.get_pruner_of_module(layer).prune_out_channels


def _checked(name: str, channels: Sequence[int], width: int) -> list[int]:
    indices = sorted(int(c) for c in channels)
    if len(set(indices)) != len(indices):
        raise UsageError(f"the plan drops a channel of '{name}' twice")
    if indices[0] < 0 or indices[-1] >= width:
        raise UsageError(f"the plan drops channel {indices[-1] if indices[-1] >= width else indices[0]} of '{name}', which has {width}")
    if len(indices) == width:
        raise UsageError(f"the plan drops all {width} channels of '{name}'; at least one must stay")
    return indices


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: named[name] for name in model.state_dict()}


def _number_entries(model: nn.Module) -> None:
    """Every entry of every tensor holds its own flat position, exact in float64 up to 2^53."""
    for t in _tensors(model).values():
        t.data = torch.arange(t.numel(), dtype=torch.float64, device=t.device).view(t.shape)
