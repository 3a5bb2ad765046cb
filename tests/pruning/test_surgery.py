"""Surgery: what is left computes what the whole network computes when nobody reads the removed channels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruning_nets import LOCKED, PRUNABLE, Residual, SelfConcatenated, conv_bn, head, images, plain, randomised
from torch import nn

from prunectl import models
from prunectl.errors import Unsatisfiable, UsageError
from prunectl.models.names import models as registered
from prunectl.pruning import cost
from prunectl.pruning.surgery import Graph, analyse, carry, compact, masked_state, replay

EXACT = 1e-12  # of the largest logit, in float64: removing zeros from a sum only changes the order of summation
NETS = {**PRUNABLE, "self_concatenated": SelfConcatenated}
QUICK = ["mobilenet_v3_small", "regnet_x_400mf", "efficientnet_b0"]
LONG = ["densenet121", "convnext_tiny", "googlenet", "maxvit_t", "swin_t", "squeezenet1_1"]


def random_plan(graph: Graph, seed: int, least: float = 0.0, most: float = 0.9) -> dict[str, list[int]]:
    """A random share, between least and most, of random channels of every free group."""
    rng = np.random.default_rng(seed)
    return {
        g.name: sorted(rng.choice(g.channels, int(g.channels * rng.uniform(least, most)), replace=False).tolist())
        for g in graph.groups
        if not g.locked
    }


def unread(model: nn.Module, graph: Graph, dropped: dict[str, list[int]]) -> nn.Module:
    """`model` whose dense layers find zeros wherever they would read a dropped channel: the mask behind BN and ReLU."""
    model = copy.deepcopy(model)
    for name, channels in dropped.items():
        for m in graph[name].members:
            layer = model.get_submodule(m.layer)
            if not m.out and isinstance(layer, nn.Conv2d | nn.Linear):
                gone = torch.tensor([i for i, r in zip(m.index, m.root, strict=True) if r in set(channels)], dtype=torch.long)
                layer.register_forward_pre_hook(
                    lambda _l, args, gone=gone, dim=1 if isinstance(layer, nn.Conv2d) else -1: args[0].index_fill(dim, gone, 0)
                )
    return model


def with_state(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        t.data = state.get(name, t.data)
    return model


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    expected = a(x)
    assert expected.abs().max() > 1e-3, "the reference network is dead, so equality would show nothing"
    return float((expected - b(x)).abs().max() / expected.abs().max())


# ---- what is left is what the mask leaves


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_compacted_equals_unread_equals_masked(net: str, seed: int) -> None:
    model, x = randomised(NETS[net](), seed), images()
    graph = analyse(model, x[:1])
    plan = random_plan(graph, seed, least=0.1)
    small = compact(model, plan, x[:1])
    assert any(plan.values())
    assert difference(unread(model, graph, plan), small.module, x) < EXACT
    assert difference(with_state(model, masked_state(model.state_dict(), small.index)), small.module, x) < EXACT
    assert cost.parameters(small.module) < cost.parameters(model)


def sweep(name: str, size: int, width: float, plans: int) -> None:
    """Masked == compacted to the 1e-5 of the largest logit that is promised (float64 gives far less), and a bit-equal replay."""
    model = randomised(models.build(name, num_classes=7, in_channels=3, image_size=size, width=width))
    x = images(2, 3, size)
    graph = analyse(model, x[:1])
    for seed in range(plans):
        plan = random_plan(graph, seed, most=(0.9, 0.5)[seed % 2])
        small = compact(model, plan, x[:1])
        assert difference(unread(model, graph, plan), small.module, x) < 1e-5
        assert difference(with_state(model, masked_state(model.state_dict(), small.index)), small.module, x) < 1e-5
        again = replay(model, [plan], x[:1])
        with torch.no_grad():
            assert torch.equal(again(x), small.module(x))


@pytest.mark.parametrize("name", registered.names())
def test_every_registered_model(name: str) -> None:
    sweep(name, 32, 0.25, plans=2 if "101" not in name else 1)


@pytest.mark.parametrize("name", QUICK)
def test_library_models(name: str) -> None:
    sweep(name, 32, 1.0, plans=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *LONG])
def test_library_models_at_several_plans(name: str) -> None:
    sweep(name, 224 if name in ("maxvit_t", "swin_t") else 64, 1.0, plans=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", registered.names())
def test_every_registered_model_at_several_plans_and_widths(name: str) -> None:
    for width in (0.25, 0.5):
        sweep(name, 32, width, plans=5)


# ---- every tensor follows


@pytest.mark.parametrize("net", ["residual", "flattened", "depthwise", "concatenated", "own_read", "recurrent", "slopes"])
def test_index_equals_deleting_rows_and_columns(net: str) -> None:
    """The oracle knows only the groups' members: rows go where a layer writes the channels, columns where it reads them."""
    model, x = randomised(NETS[net]()), images()
    graph = analyse(model, x[:1])
    plan = random_plan(graph, 5, least=0.2)
    expected = {name: t.numpy() for name, t in model.state_dict().items()}
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    for name, channels in plan.items():
        for m in graph[name].members:
            gone = [i for i, r in zip(m.index, m.root, strict=True) if r in channels]
            (rows if m.out else columns).setdefault(m.layer, []).extend(gone)
    for name, t in expected.items():
        module = model.get_submodule(name.rpartition(".")[0])
        layer = next(n for n, m in model.named_modules() if m is module)  # the first of two names
        if t.ndim and len(t) > 1:
            t = np.delete(t, rows.get(layer, []), axis=0)
        if t.ndim > 1:
            t = np.delete(t, columns.get(layer, []), axis=1)
        expected[name] = t
    small = compact(model, plan, x[:1])
    momentum = {name: torch.randn_like(t) for name, t in model.named_parameters()}
    carried = carry(momentum, small.index)
    for name, t in small.module.state_dict().items():
        assert np.array_equal(t.numpy(), expected[name]), name
        positions = small.index[name].flatten()
        assert t.dim() == 0 or bool((positions.diff() > 0).all()), "entries keep their order"
        if name in momentum:
            assert torch.equal(carried[name], momentum[name].flatten()[positions].view(t.shape))
            assert carried[name].shape == t.shape and carried[name].dtype == momentum[name].dtype


def test_carry_and_compaction_keep_dtypes_devices_and_counters() -> None:
    model, x = randomised(Residual()).float(), images().float()
    model.norm.num_batches_tracked.fill_(7)
    small = compact(model, {"conv1": [0, 3], "conv2": [1]}, x[:1]).module
    assert {n: t.dtype for n, t in small.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert small.norm.num_batches_tracked.item() == 7


# ---- steps


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), net=st.sampled_from(["residual", "depthwise", "concatenated", "skipped_concat", "self_concatenated"]))
def test_pruning_a_pruned_net_composes(seed: int, net: str) -> None:
    model, x = randomised(NETS[net](), seed), images()
    steps, small, index = [], model, {name: torch.arange(t.numel()).view(t.shape) for name, t in model.state_dict().items()}
    for step in range(2):
        steps.append(random_plan(analyse(small, x[:1]), seed + step, most=0.6))
        cut = compact(small, steps[-1], x[:1])
        small, index = cut.module, carry(index, cut.index)
    replayed = replay(model, steps, x[:1])
    assert replayed.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in replayed.state_dict().items())
    with torch.no_grad():
        assert torch.equal(replayed(x), small(x))
    assert difference(with_state(model, masked_state(model.state_dict(), index)), small, x) < EXACT


def test_replay_on_fresh_weights_gives_the_same_architecture() -> None:
    x = images()
    plan = {"conv1": [0, 1, 2], "conv2": [15]}
    a, b = (replay(randomised(Residual(), seed), [plan], x[:1]) for seed in (0, 1))
    assert [(n, t.shape) for n, t in a.state_dict().items()] == [(n, t.shape) for n, t in b.state_dict().items()]


def test_two_prunes_in_one_process_do_not_influence_each_other() -> None:
    first, second, x = randomised(Residual()), randomised(PRUNABLE["depthwise"]()), images()
    plan = {"conv1": [0, 5, 6], "conv2": [2]}
    before = compact(first, plan, x[:1]).module.state_dict()
    compact(second, random_plan(analyse(second, x[:1]), 0), x[:1])
    compact(first, {"conv1": [1]}, x[:1])
    after = compact(first, plan, x[:1]).module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_model_is_left_as_it_was() -> None:
    model, x = randomised(Residual()), images()
    model.train()
    model.norm1.eval()
    model.stem.weight.requires_grad_(False)
    model(x).sum().backward()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    graph = analyse(model, x[:1])
    small = compact(model, {"conv1": [0]}, x[:1]).module
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in small.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip((p.grad for p in model.parameters()), grads, strict=True))
    assert all(p.grad is None for p in small.parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert analyse(model, x[:1]) == graph, "deterministic"
    assert not set(map(id, small.parameters())) & set(map(id, model.parameters()))


def test_nothing_to_drop_is_a_copy() -> None:
    model, x = randomised(plain()), images()
    small = compact(model, {"0": [], "3": []}, x[:1])
    assert all(torch.equal(t, small.module.state_dict()[n]) for n, t in model.state_dict().items())
    assert small.module is not model


def test_a_trace_without_autograd_around_it() -> None:
    model, x = randomised(plain()), images()
    with torch.no_grad():
        assert len(analyse(model, x[:1]).groups) == 3
        assert compact(model, {"0": [1]}, x[:1]).module[0].out_channels == 15


# ---- groups


@pytest.mark.parametrize("net", NETS)
def test_every_output_channel_of_every_dense_layer_is_in_exactly_one_group(net: str) -> None:
    model = randomised(NETS[net]())
    graph = analyse(model, images(1))
    written: dict[str, list[int]] = {}
    for g in graph.groups:
        for m in g.members:
            layer = model.get_submodule(m.layer)
            if m.out and isinstance(layer, nn.Conv2d | nn.Linear):
                written.setdefault(m.layer, []).extend(m.index or range(layer.weight.shape[0]))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {n: sorted(i) for n, i in written.items()} == {n: list(range(m.weight.shape[0])) for n, m in layers.items()}


@pytest.mark.parametrize("net", NETS)
def test_the_classifiers_outputs_never_go(net: str) -> None:
    model, x = randomised(NETS[net]()), images()
    graph = analyse(model, x[:1])
    last = [g for g in graph.groups if "outputs" in (g.locked or "")]
    assert [g.channels for g in last] == [5]
    with pytest.raises(UsageError, match="its outputs"):
        compact(model, {last[0].name: [0]}, x[:1])


@pytest.mark.parametrize("net", LOCKED)
def test_channels_that_cannot_go_one_by_one_are_locked_and_the_others_free(net: str) -> None:
    build, expected = LOCKED[net]
    model, x = randomised(build()), images()
    graph = analyse(model, x[:1])
    locked = {g.name for g in graph.groups if g.locked} | {
        layer
        for g in graph.groups
        for layer in g.producers
        if g.locked and isinstance(m := model.get_submodule(layer), nn.Conv2d | nn.Linear) and len(m.weight) > 1
    }
    assert locked == expected | {graph.groups[-1].name}
    plan = {n: c for n, c in random_plan(graph, 0, least=0.2).items() if c}
    assert plan
    assert difference(unread(model, graph, plan), compact(model, plan, x[:1]).module, x) < EXACT


class Mixed(nn.Module):
    """A stem whose channels are mixed by code that has no weights, and a plain body behind it."""

    def __init__(self, mix: str, depth: int) -> None:
        super().__init__()
        self.mix = mix
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.body = nn.Sequential(*(m for _ in range(depth) for m in (*conv_bn(16, 16), nn.ReLU())))
        self.head = nn.Sequential(*head(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.mix == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.mix == "norm":
            x = 4 * x / (x.norm(dim=1, keepdim=True) + 1e-6)
        elif self.mix == "softmax":
            x = 16 * x.softmax(1)
        return self.head(self.body(x))


@pytest.mark.parametrize("depth", [1, 8, 20])
@pytest.mark.parametrize("mix", ["nothing", "mean", "norm", "softmax"])
def test_channels_that_code_mixes_are_locked_however_deep_the_network_behind_it(mix: str, depth: int) -> None:
    """In single precision, in which networks are pruned: what the mixing changes fades on the way to the logits."""
    locked = [g.name for g in analyse(Mixed(mix, depth), torch.zeros(1, 3, 8, 8)).groups if g.locked]
    assert locked == [*(["stem.0"] if mix != "nothing" else []), "head.2"]


class Gated(nn.Module):
    """Two branches whose channels the code couples where autograd sees nothing, between groups that it does not."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.gate = gate
        self.convs = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in (1, 16, 16, 16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth, last = self.convs
        x = F.relu(first(x))
        kept = F.relu(second(x))
        y = F.relu(third(kept))
        y = y * (kept > 0).to(y) if self.gate else y + kept.detach()
        return self.head(F.relu(last(F.relu(fourth(y)))).mean((2, 3)))


@pytest.mark.parametrize("gate", [False, True])
def test_channels_that_are_coupled_where_no_trace_sees_it_are_locked_and_no_others(gate: bool) -> None:
    model = randomised(Gated(gate), 0)
    graph = analyse(model, torch.zeros(1, 1, 8, 8))
    assert {g.name: bool(g.locked) for g in graph.groups if g.name != "head"} == {f"convs.{i}": i in (1, 2) for i in range(5)}, [
        (g.name, g.locked) for g in graph.groups
    ]


def test_a_gate_that_is_expanded_by_hand_locks_nothing() -> None:
    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.down, self.up, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.conv(x))
            gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
            return self.head((x * gate[:, :, None, None].expand_as(x)).mean((2, 3)))

    model, x = randomised(Excited(), 0), torch.randn(2, 1, 8, 8).double()
    graph = analyse(model, x[:1])
    free = {g.name: [1, 2, 5] for g in graph.groups if not g.locked}
    assert {g.channels for g in graph.groups if g.name in free} == {16, 8}
    small, masked = compact(model, free, x[:1]), copy.deepcopy(model)
    masked.load_state_dict(masked_state(model.state_dict(), small.index))
    gone = torch.zeros(16, dtype=torch.bool)
    gone[[1, 2, 5]] = True
    masked.conv.register_forward_hook(lambda _m, _i, y: y.masked_fill(gone[None, :, None, None], 0))
    torch.testing.assert_close(small.module(x), masked(x))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("which", [2, 4, 7])
def test_a_layer_whose_weight_is_computed_from_others_stays_whole(wrap, which: int) -> None:  # type: ignore[no-untyped-def]
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)]
    layers[which] = wrap(layers[which])
    x = torch.zeros(1, 1, 8, 8)
    graph = analyse(nn.Sequential(*layers).eval(), x)
    free = {g.name for g in graph.groups if not g.locked}
    touched = {2: {"0", "2"}, 4: {"2", "4"}, 7: {"4"}}[which]
    assert free == {"0", "2", "4"} - touched
    assert any("computed from other weights" in (g.locked or "") for g in graph.groups)


def test_weights_that_are_computed_from_others_are_refused() -> None:
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *head(8))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    model(images(1).float())
    with pytest.raises(Unsatisfiable, match="cannot be copied"):
        analyse(model, torch.zeros(1, 3, 8, 8))


def test_a_parameter_of_whole_numbers_disturbs_nothing() -> None:
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *head(8))
    model.register_parameter("counter", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert [g.name for g in analyse(model, torch.zeros(1, 3, 8, 8)).groups if not g.locked] == ["0"]


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("c_out", [8, 16])
def test_a_grouped_convolution_is_locked(groups: int, c_out: int) -> None:
    """As many groups as outputs is not depthwise when each group has two inputs."""
    model = randomised(
        nn.Sequential(*conv_bn(3, 16), nn.ReLU(), *conv_bn(16, c_out, groups=groups), nn.ReLU(), *conv_bn(c_out, 12), *head(12))
    )
    graph = analyse(model, images(1))
    reasons = {g.locked for g in graph.groups if {"0", "3"} & set(g.producers)}
    assert reasons == {f"3 is a grouped convolution ({groups} groups)"}
    assert graph["6"].locked is None


def test_one_channel_convolutions_are_dense() -> None:
    """One input and one output channel are one group of one, which is not depthwise."""
    model, x = randomised(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 12, 3), nn.ReLU(), *head(12))), images(2, 1)
    graph = analyse(model, x[:1])
    assert [(m.layer, m.out) for m in graph["0"].members] == [("0", True), ("2", False)]
    assert difference(unread(model, graph, {"2": [0, 7]}), compact(model, {"2": [0, 7]}, x[:1]).module, x) < EXACT


def test_a_depthwise_convolution_goes_with_its_channels() -> None:
    model, x = randomised(PRUNABLE["depthwise"]()), images()
    (group,) = (g for g in analyse(model, x[:1]).groups if "block.3" in g.producers)
    small = compact(model, {group.name: [0, 1, 5]}, x[:1]).module
    depthwise = small.block[3]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 21


def test_linear_inputs_behind_a_flatten_follow_their_channel() -> None:
    graph = analyse(randomised(PRUNABLE["flattened"]()), images(1))
    reader = next(m for m in graph["0"].members if m.layer == "4")
    assert [r for _, r in sorted(zip(reader.index, reader.root, strict=True))] == [i // 16 for i in range(192)]


def test_batch_norm_right_behind_a_layer() -> None:
    graph = analyse(randomised(Residual()), images(1))
    assert graph.norm_after == {"stem": "norm", "conv1": "norm1", "conv2": "norm2"}
    assert analyse(randomised(PRUNABLE["preactivation"]()), images(1)).norm_after == {"conv1": "norm2"}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("plain", {"0", "3"}),
        ("flattened", {"0", "4"}),
        ("residual", {"conv1"}),
        ("preactivation", {"conv1"}),
        ("depthwise", set()),  # ReLU6 and a depthwise layer
        ("concatenated", {"stem.0", "join.0"}),
        ("recurrent", {"last.0"}),
        ("own_read", set()),
        ("squeeze_excite", {"squeeze"}),
        ("slopes", set()),  # a learned slope is homogeneous too, but stays out
    ],
)
def test_plain_groups_scale_through_to_their_readers(net: str, expected: set[str]) -> None:
    model, x = randomised(NETS[net]()), images()
    graph = analyse(model, x[:1])
    assert graph.plain == expected
    for name in graph.plain:  # twice the channel, half the weights that read it: the same network
        other = copy.deepcopy(model)
        layer = other.get_submodule(graph.norm_after.get(name, name))
        with torch.no_grad():
            layer.weight[1] *= 2
            layer.bias[1] *= 2
            for m in graph[name].members:
                reader = other.get_submodule(m.layer)
                if not m.out:
                    reader.weight[:, [i for i, r in zip(m.index, m.root, strict=True) if r == 1]] *= 0.5
        assert difference(model, other, x) < EXACT


# ---- what is refused


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"conv9": [0]}, "'conv9', which is no convolution"),
        ({"norm1": [0]}, "'norm1', which is no convolution"),
        ({"conv1": [20]}, "channel 20 of 'conv1', which has 20"),
        ({"conv1": [-1, 3]}, "channel -1 of 'conv1', which has 20"),
        ({"conv1": [3, 3]}, "a channel of 'conv1' twice"),
        ({"conv1": list(range(20))}, "all 20 channels of 'conv1'"),
        ({"stem": [1], "conv2": [5]}, "'conv2' twice: another group that it names is coupled"),
        ({"fc": [0]}, "'fc', which cannot go: .* its outputs"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(plan: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compact(randomised(Residual()), plan, images(1))


def test_a_plan_for_locked_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="'mid', which cannot go: across is a GroupNorm"):
        compact(randomised(LOCKED["group_norm"][0]()), {"mid": [0]}, images(1))


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no channel group 'conv7'; its groups are "):
        analyse(randomised(plain()), images(1))["conv7"]


def test_a_shuffle_network_is_refused_in_one_sentence() -> None:
    model = models.build("shufflenet_v2_x0_5", num_classes=5, in_channels=3, image_size=32).eval()
    with pytest.raises(Unsatisfiable, match="channels of this ShuffleNetV2 cannot be followed"):
        analyse(model, torch.zeros(1, 3, 32, 32))


class Windows(nn.Module):
    """Windowed attention by hand, which sends torch-pruning's own search round in circles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm(x).view(-1, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
        q, k, v = self.qkv(y).reshape(len(y), 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 16))
        x = x + y.view(-1, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return self.fc(x.mean((1, 2)))


def test_windowed_attention_is_locked_and_the_rest_is_free() -> None:
    model, x = randomised(Windows()), images()
    graph = analyse(model, x[:1])
    assert [g.name for g in graph.groups if not g.locked] == ["stem.0"]
    assert difference(unread(model, graph, {"stem.0": [0, 9]}), compact(model, {"stem.0": [0, 9]}, x[:1]).module, x) < EXACT


def test_an_error_in_the_network_itself_is_not_taken_for_a_tracing_error() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        analyse(Broken(), images(1))


class Picking(nn.Module):
    """A stem whose channels the code picks or mixes by their numbers."""

    def __init__(self, pick: str, channels: int) -> None:
        super().__init__()
        self.stem, self.pick, self.read = nn.Conv2d(3, channels, 3), pick, nn.Conv2d(channels, 8, 3)
        self.norm, self.out = nn.LocalResponseNorm(5), nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.stem(x))
        if self.pick == "norm":
            y = self.norm(y)
        elif self.pick == "flip":
            y = y + y.flip(1)
        elif self.pick != "nothing":
            y = y * torch.sigmoid(y[:, int(self.pick)])[:, None]
        return self.out(F.relu(self.read(y)).mean((2, 3)))


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("pick", ["nothing", "0", "-1", "flip", "norm"])
def test_channels_that_code_picks_by_their_numbers_are_locked(pick: str, channels: int) -> None:
    torch.manual_seed(0)
    graph = analyse(Picking(pick, channels), torch.zeros(1, 3, 12, 12))
    assert (graph["stem"].locked is None) == (pick == "nothing")


class TrainedBeside(nn.Module):
    """An auxiliary head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.out, self.aux = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x):
        y = F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3))
        return self.out(y) + self.aux(y) if self.training else self.out(y)


def test_what_only_training_reads_stays_and_the_random_numbers_do_too() -> None:
    model, before = TrainedBeside().eval(), torch.get_rng_state()
    free = [g.name for g in analyse(model, torch.zeros(1, 3, 12, 12)).groups if not g.locked]
    assert free == ["stem"] and torch.equal(torch.get_rng_state(), before)


def test_one_slope_for_all_ties_no_layers() -> None:
    slope = nn.PReLU()
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(3, 16, 3), slope, nn.Conv2d(16, 24, 3), slope, *pooled, nn.Linear(24, 32), slope, nn.Linear(32, 5))
    example = torch.zeros(1, 3, 12, 12)
    graph = analyse(model, example)
    assert [g.name for g in graph.groups if not g.locked] == ["0", "2", "6"]
    small = compact(model, {"0": [1, 2]}, example).module
    assert (small[0].out_channels, small[2].out_channels, small[6].out_features) == (14, 24, 32)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.kept = nn.Conv2d(3, 16, 3), nn.Linear(16, 5), {}

    def forward(self, x):
        self.kept["x"] = F.relu(self.stem(x)).mean((2, 3))
        return self.out(self.kept["x"])


def test_a_network_that_keeps_its_activations_can_be_counted_and_cut_again() -> None:
    model, example = Keeping(), torch.zeros(1, 3, 12, 12)
    cost.count(model, (3, 12, 12))
    small = compact(model, {"stem": [0, 1]}, example).module
    cost.count(small, (3, 12, 12))
    assert compact(small, {"stem": [0]}, example).module.stem.out_channels == 13


def test_a_network_that_keeps_activations_of_training_only_can_be_cut_after_training() -> None:
    class Hinting(Keeping):
        def forward(self, x):
            if not self.training:
                return self.out(F.relu(self.stem(x)).mean((2, 3)))
            return super().forward(x)

    model, example = Hinting(), torch.zeros(1, 3, 12, 12)
    model(torch.rand(4, 3, 12, 12)).sum().backward()
    assert [g.locked for g in analyse(model, example).groups if g.name == "stem"] == [None]
    small = compact(model, {"stem": [0, 1]}, example).module
    assert small.stem.out_channels == 14 and not small.kept["x"].requires_grad
    assert torch.equal(small.kept["x"], model.kept["x"]) and model.kept["x"].requires_grad


def test_only_rectified_channels_merge() -> None:
    """A unit of constant output gives its readers relu(bias), and nothing gives it to them without a ReLU."""
    straight = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert analyse(straight, torch.zeros(1, 3, 12, 12)).plain == {"1"}
