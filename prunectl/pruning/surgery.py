"""Channels taken out of a network for good; the only door to torch-pruning.

A `Graph` names the network's groups of coupled channels: layers whose outputs are added or concatenated lose the same
channels together. `compact` removes channels and also returns, for every tensor of the small network, where each of
its entries stood in the large one. That index is how weights, momentum and averages follow the surgery, and how a
masked network is made to test against.

Indices always refer to the numbering of the network that is passed in. torch-pruning accepts an index out of range,
keeps settings between calls and records history twice; so indices are checked here, every call gets fresh objects, and
only `get_pruning_group(...).prune()` is used."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning.copying import copied

Dropped = Mapping[str, Sequence[int]]
Dense = nn.Conv2d | nn.Linear
Norm = nn.modules.batchnorm._BatchNorm
PerChannel = Norm | nn.modules.instancenorm._InstanceNorm | nn.PReLU
_Function = tp.ops._ElementWiseOp | tp.ops._ConcatOp | tp.ops._ReshapeOp | tp.ops._ExpandOp | tp.ops._OutputOp  # torch-pruning's stand-ins
_TRACER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)  # torch-pruning has none of its own
_ACTIVATIONS = (
    *("Relu", "LeakyRelu", "Prelu", "Hardtanh", "Hardswish", "Silu", "Gelu", "Mish", "Elu", "Celu", "Rrelu"),
    *("Tanh", "Sigmoid", "Softplus", "Hardsigmoid", "Threshold", "ClampMin", "ClampBackward"),
)
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
    """`channels` coupled channels, named after the layer that produces them; `locked` says why they cannot go.

    The members of a locked group may carry no numbers."""

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

    late: batch norms fed by an activation, which therefore move no boundary of the units before it.
    plain: the groups with one producer whose channels reach every reader one by one, through a ReLU and nothing but ReLU,
    pooling and flattening, so that c times a channel is c times what its readers get (c > 0)."""

    groups: tuple[Group, ...]
    norm_after: Mapping[str, str]
    late: frozenset[str] = frozenset()
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
    """The channel groups of `model`, found by tracing it once on `example` (1, C, H, W). The model is left as it was.

    A group is free only after a trial: with random weights, a third of the channels of every free group is taken out,
    and the small network has to compute what the large one computes with those channels masked, and to run in training
    mode if the large one does. So a constant in the network's code, a softmax over channels, a shuffle or a head that only
    training runs, which a trace cannot see, locks the groups that it touches.
    Raises Unsatisfiable when the network cannot be traced."""
    try:
        twin = copied(model).eval()
    except RuntimeError as error:  # weights that are computed from others, as torch.nn.utils.weight_norm does it
        raise Unsatisfiable(f"this {type(model).__name__} cannot be copied, so no smaller one can be made of it: {error}") from error
    graph = _trace(twin, example)
    names = {module: name for name, module in twin.named_modules()}
    groups = _groups(graph, twin)
    norms, late = {}, set()
    for module, node in graph.module2node.items():
        followers = [n.module for n in node.outputs]
        if module in names and len(followers) == 1 and isinstance(followers[0], Norm):
            norms[names[module]] = names[followers[0]]
        if isinstance(module, Norm) and _activated(node):
            late.add(names[module])
    plain = {g.name for g in groups if _is_plain(graph, g, twin)}
    trial, free = _with_random_weights(model), [g for g in groups if not g.locked]
    some = {g.name: _a_third(g.channels, place) for place, g in enumerate(free)}
    while unsound := _unsound(trial, free, some, example):
        free = [g for g in free if g.name not in unsound]
    sound = {g.name for g in free}
    reason = "without them the network computes something else than with them masked: its code fixes their number or mixes them"
    groups = [g if g.locked or g.name in sound else replace(g, locked=reason) for g in groups]
    return Graph(tuple(groups), norms, frozenset(late), frozenset(plain & sound))


def compact(model: nn.Module, dropped: Dropped, example: Tensor) -> Compacted:
    """`model` without the dropped channels, as a new module on the same device, with weights and modes carried over.

    dropped: group name -> channel numbers to remove. Raises UsageError for an unknown or locked group, two names of one
    group, a number out of range or given twice, and for a group that would lose all its channels."""
    twin = copied(model).eval()
    graph = _trace(twin, example)
    layers = dict(twin.named_modules(remove_duplicate=False))
    widths = {name: layer.weight.shape[0] for name, layer in layers.items() if isinstance(layer, Dense)}
    names = _names(twin)
    _number_entries(twin)
    for name, channels in dropped.items():
        if len(channels) == 0:
            continue
        layer = layers.get(name)
        if not isinstance(layer, Dense):
            raise UsageError(f"the plan drops channels of '{name}', which is no convolution or linear layer of this network")
        if reason := _followed(graph, names, layer)[1]:
            raise UsageError(f"the plan drops channels of '{name}', which cannot go: {reason}")
        if layer.weight.shape[0] != widths[name]:
            raise UsageError(f"the plan drops channels of '{name}' twice: another group that it names is coupled to it")
        indices = _checked(name, channels, widths[name])
        graph.get_pruning_group(layer, _out_pruner(graph, layer), idxs=indices).prune()
        if layer.weight.shape[0] != widths[name] - len(indices):
            raise UsageError(f"the plan drops channels of '{name}', whose channels depend on one another: they cannot go one by one")
    index = {name: t.detach().round().long() for name, t in twin.state_dict().items()}
    _fill(twin, carry(model.state_dict(), index))
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
        p.requires_grad_(p.is_floating_point())  # the tracer follows autograd
    like = next(p for p in model.parameters() if p.is_floating_point())
    with torch.enable_grad():
        try:
            shared = [m for m in model.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]  # one slope ties no channels
            x = example.to(like.device, like.dtype)
            graph = tp.DependencyGraph().build_dependency(model, x, forward_fn=lambda net, x: net(x), ignored_layers=shared, verbose=False)
            with torch.no_grad():
                model(x)  # a network that keeps activations keeps some that can be copied
            return graph
        except _TRACER_ERRORS as error:
            raise Unsatisfiable(
                f"the channels of this {type(model).__name__} cannot be followed, so none can be removed: it splits, shuffles or"
                f" reshapes them beyond what is understood; train it as it is, or take another network ({type(error).__name__}: {error})"
            ) from error


def _groups(graph: tp.DependencyGraph, model: nn.Module) -> list[Group]:
    """Every group once, in the order of the layers.

    Narrow layers go first: where a concatenation is added to a wide layer, the wide one's channels fall into the groups
    of the narrow ones."""
    names = _names(model)
    order = {name: i for i, name in enumerate(names.values())}
    roots = sorted((m for m in graph.module2node if isinstance(m, Dense) and m in names), key=lambda m: m.weight.shape[0])
    groups: list[Group] = []
    left = {names[root]: set(range(root.weight.shape[0])) for root in roots}
    for root in roots:
        if left[names[root]]:
            groups.append(_group(graph, root, names, model))
            for m in groups[-1].members:
                if m.out and m.layer in left:
                    left[m.layer] -= set(m.index or left[m.layer])
    return sorted(groups, key=lambda g: order[g.name])


def _group(graph: tp.DependencyGraph, root: Dense, names: Mapping[object, str], model: nn.Module) -> Group:
    name, channels = names[root], root.weight.shape[0]
    followed, reason = _followed(graph, names, root)
    if reason:
        return Group(name, channels, followed, reason)
    members = []
    for item in graph.get_pruning_group(root, _out_pruner(graph, root), idxs=list(range(channels))):
        module = item.dep.target.module
        if module in names:
            members.append(
                Member(names[module], graph.is_out_channel_pruning_fn(item.dep.handler), tuple(item.idxs), tuple(item.root_idxs))
            )
    members = _without_repeats(members, model)
    partial = [m.layer for m in members if not _covers(m, channels, model)]
    locked = f"they are padded, repeated or mixed on the way to {partial[0]}" if partial else None
    return Group(name, channels, tuple(members), locked)


def _names(model: nn.Module) -> dict[object, str]:
    """The name of every module and every parameter."""
    modules: dict[object, str] = {module: name for name, module in model.named_modules()}
    return modules | {p: name for name, p in model.named_parameters()}


def _followed(graph: tp.DependencyGraph, names: Mapping[object, str], root: Dense) -> tuple[tuple[Member, ...], str | None]:
    """Layers that `root`'s output channels run through, whatever their numbers, and why the channels cannot go, or None.

    Asked before torch-pruning numbers the channels, because behind a split or a window partition that does not end.
    A concatenation that is entered from one of its inputs is not left through the others."""
    todo = [(graph.module2node[root], _out_pruner(graph, root), False)]
    seen = set(todo)
    members: dict[tuple[str, bool], Member] = {}
    reason, read = None, False
    while todo:
        node, handler, from_input = todo.pop()
        reason = reason or _obstacle(node.module, names.get(node.module, ""))
        out = graph.is_out_channel_pruning_fn(handler)
        if isinstance(node.module, nn.Module) and node.module in names:
            members[names[node.module], out] = Member(names[node.module], out, (), ())
        read = read or (isinstance(node.module, Dense) and not out)
        for dep in node.dependencies:
            backwards = dep.target in node.inputs
            if dep.is_triggered_by(handler) and not (backwards and from_input and isinstance(node.module, tp.ops._ConcatOp)):
                step = (dep.target, dep.handler, not backwards)
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return tuple(members.values()), reason or (None if read else "nothing inside the network reads them: they are its outputs")


def _obstacle(module: object, name: str) -> str | None:
    """What keeps channels from leaving one by one where they pass `module`."""
    if isinstance(module, nn.Module) and is_parametrized(module):
        return f"what {name} computes with is computed from other weights"
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels == module.out_channels
        return None if module.groups == 1 or depthwise else f"{name} is a grouped convolution ({module.groups} groups)"
    if isinstance(module, nn.MultiheadAttention):
        return f"{name} is an attention layer"
    if isinstance(module, nn.Linear | PerChannel | _Function):
        return None
    if isinstance(module, nn.Parameter):
        return f"the parameter {name} shapes them"
    if name:
        return f"{name} is a {type(module).__name__}"  # a norm over channels, a transposed convolution, a recurrent layer
    return "the network's code splits or slices them"


def _covers(member: Member, channels: int, model: nn.Module) -> bool:
    """Whether a member has equally many channels for each of the group's, all of them its own."""
    each, rest = divmod(len(member.index), channels)
    layer = model.get_submodule(member.layer)
    weight = layer.weight if isinstance(layer, Dense) else None
    width = weight.shape[0 if member.out else 1] if weight is not None else max(member.index) + 1
    return rest == 0 and sorted(member.root) == sorted([*range(channels)] * each) and max(member.index) < width


def _with_random_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose every weight and batch-norm statistic counts: no zero scales, no idle biases.

    Each layer damps its input, so that in a deep residual network neither activations nor rounding errors blow up."""
    twin = copied(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.LocalResponseNorm):
            module.alpha = 1.0  # else what its neighbours do to a channel is lost in rounding
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, t in _tensors(twin).items():
        if isinstance(t, nn.Parameter) and t.dim() >= 2:
            state[name] = (torch.randn(t.shape, generator=draw) * (0.5 / max(1, t[0].numel())) ** 0.5).to(t)
        elif isinstance(t, nn.Parameter) or name.endswith(("running_mean", "running_var")):
            low = 0.0 if name.endswith(("bias", "running_mean")) else 0.5
            state[name] = (low + torch.rand(t.shape, generator=draw)).to(t)
        else:
            state[name] = t
    _fill(twin, state)
    return twin


def _unsound(model: nn.Module, groups: Sequence[Group], some: Dropped, example: Tensor) -> set[str]:
    """Names of groups that cannot lose `some` of their channels, as few as halving finds; none where all can together."""

    def sound(chosen: Sequence[Group]) -> bool:
        return _equals_masked(model, {g.name: some[g.name] for g in chosen}, example)

    if not groups or sound(groups):
        return set()
    if len(groups) == 1:
        return {groups[0].name}
    first, second = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    if alone := _unsound(model, first, some, example) | _unsound(model, second, some, example):
        return alone
    fits, fails = 0, len(second)  # how many of the second half go with all of the first
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if sound([*first, *second[:middle]]) else (fits, middle)
    return {second[fails - 1].name}


def _a_third(channels: int, place: int) -> list[int]:
    """The first and the last channel, which code likes to pick, and a third of the others, other ones and one more or less for every
    group: groups that are coupled where no trace sees it then fit each other neither in number nor in what they compute."""
    others = range(2, channels - 1)
    drawn = random.Random(place).sample(others, min(len(others), len(others) // 3 + place % 2))
    return sorted({0, *drawn, channels - 1}) if channels > 2 else []


@torch.no_grad()
def _equals_masked(model: nn.Module, dropped: Dropped, example: Tensor) -> bool:
    """Whether `model` without the dropped channels computes what it computes with them masked, on two random images.

    Every dense layer's surviving outputs are compared, each at its own scale: on the way to the logits a difference fades."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.rand((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(like)
    masked = copied(model)
    try:
        small = compact(model, dropped, example)
        got = _dense_outputs(small.module, x)
    except (*_TRACER_ERRORS, RuntimeError, UsageError, Unsatisfiable):
        return False
    if not _trains(small.module, x) and _trains(copied(model), x):
        return False  # what only training runs, an auxiliary head say, no longer fits
    _fill(masked, masked_state(model.state_dict(), small.index))
    for name, expected in _dense_outputs(masked, x).items():
        if name and f"{name}.weight" in small.index:  # else it is computed from others, and keeps all its outputs
            weight, index = model.get_parameter(f"{name}.weight"), small.index[f"{name}.weight"]
            survivors = (index.flatten(1)[:, 0] // weight[0].numel()).to(x.device)
            expected = [y.index_select(1 if weight.dim() == 4 else -1, survivors) for y in expected]
        if len(expected) != len(got.get(name, [])) or not all(map(_same, got[name], expected)):
            return False
    return True


def _trains(model: nn.Module, x: Tensor) -> bool:
    """Whether the network runs in training mode, in which it is left."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout draws
        try:
            model.train()(x)
        except (*_TRACER_ERRORS, RuntimeError):
            return False
    return True


def _dense_outputs(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What each dense layer gives, call by call, and under "" what the network does."""
    seen: dict[str, list[Tensor]] = {"": []}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Dense)}
    hooks = [m.register_forward_hook(lambda _m, _i, y, n=name: seen.setdefault(n, []).append(y)) for name, m in layers.items()]
    try:
        seen[""].append(model(x))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _same(got: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5  # summation order costs some eps, a channel misread far more
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def _is_plain(graph: tp.DependencyGraph, group: Group, model: nn.Module) -> bool:
    writers = [m for m in group.members if m.out and isinstance(model.get_submodule(m.layer), Dense)]
    return len(writers) == 1 and _scales(graph.module2node[model.get_submodule(group.name)], is_producer=True)


def _scales(node: tp.dependency.Node, *, is_producer: bool = False, rectified: bool = False) -> bool:
    """Whether all that follows `node` up to the next dense layers is rectified, works channel by channel and scales with its input."""
    if not node.outputs:
        return False
    for after in node.outputs:
        module, operator = after.module, _operator(after)
        if isinstance(module, Dense):
            if getattr(module, "groups", 1) != 1 or not rectified:
                return False
        elif isinstance(module, Norm):
            if not is_producer or len(node.outputs) != 1 or not _scales(after):
                return False
        elif not operator.startswith(_HOMOGENEOUS) or not _scales(after, rectified=rectified or operator.startswith("Relu")):
            return False
    return True


def _activated(node: tp.dependency.Node) -> bool:
    """Whether what `node` reads comes from an activation, directly or through pooling and flattening."""
    return any(
        _operator(n).startswith(_ACTIVATIONS)
        or (not isinstance(n.module, Dense | Norm) and _operator(n).startswith(_HOMOGENEOUS) and _activated(n))
        for n in node.inputs
    )


def _operator(node: tp.dependency.Node) -> str:
    """The name of the function that autograd keeps for the node's output, or nothing."""
    return str(node.grad_fn.name()) if node.grad_fn is not None else ""


def _without_repeats(members: list[Member], model: nn.Module) -> list[Member]:
    """A batch norm or a depthwise convolution is listed once for its outputs and once for its inputs: the first stays.

    A dense layer that reads the stream that it writes is two members."""
    seen: dict[tuple[str, tuple[int, ...], bool], Member] = {}
    for m in members:
        layer = model.get_submodule(m.layer)
        two_sided = isinstance(layer, Dense) and getattr(layer, "groups", 1) == 1
        key = (m.layer, m.index, two_sided and m.out)
        if key not in seen or (m.out and not seen[key].out):
            seen[key] = m
    return list(seen.values())


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
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: named[name] for name in model.state_dict()}


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, t in _tensors(model).items():
        t.data = state[name]


def _number_entries(model: nn.Module) -> None:
    """Every entry of every tensor holds its own flat position, exact in float64 up to 2^53."""
    for t in _tensors(model).values():
        t.data = torch.arange(t.numel(), dtype=torch.float64, device=t.device).view(t.shape)
