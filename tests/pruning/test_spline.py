"""Spline geometry: codes against hooks, Eq. 2 against loops, the ranking against a removal done from scratch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import Residual, images, plain, randomised
from torch import Tensor, nn

from prunectl import models
from prunectl.errors import UsageError
from prunectl.pruning import spline
from prunectl.pruning.spline import activation_code, bit_distance, canvas, code_distance, norm_code, removal_order, spline_scores
from tests.reference import spline_oracle as oracle

ROUNDING = 1e-12  # float64 sums of at most a few hundred terms of order one
FORMS = {
    "hyperplane": (spline.hyperplane_distances, oracle.hyperplane_distance),
    "signed": (spline.signed_distances, oracle.signed_distance),
    "published": (spline.published_distances, oracle.published_distance),
}


def unpacked(layer: spline.LayerCode) -> np.ndarray:
    return np.unpackbits(layer.bits.numpy(), axis=1)[:, : layer.units].astype(bool)


def units(n: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Filters with some nearly parallel and some nearly opposite ones, as trained layers have."""
    g = torch.Generator().manual_seed(seed)
    filters = torch.randn(n, dim, generator=g, dtype=torch.float64)
    for k in range(0, n - 1, 3):
        sign = 1 if k % 2 else -1
        filters[k + 1] = sign * 2.5 * filters[k] + 0.05 * torch.randn(dim, generator=g, dtype=torch.float64)
    bias, energy = torch.randn(n, generator=g, dtype=torch.float64), 0.1 + torch.rand(n, generator=g, dtype=torch.float64)
    return filters, bias, energy


# ---- oracles


@pytest.mark.parametrize("form", FORMS)
def test_distances_equal_loops(form: str) -> None:
    matrix, pair = FORMS[form]
    filters, bias, _ = units(17, 9, 0)
    got = matrix(filters, bias, rho=0.3).numpy()
    f, b = filters.numpy(), bias.numpy()
    for i, j in itertools.permutations(range(17), 2):
        assert got[i, j] == pytest.approx(pair(f[i], b[i], f[j], b[j], 0.3), abs=ROUNDING)


@pytest.mark.parametrize("priced", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "dim", "rho"), [(2, 3, 0.05), (13, 5, 0.05), (40, 27, 0.5), (40, 4, 0.0)])
def test_removal_order_equals_greedy_removal_from_scratch(form: str, n: int, dim: int, rho: float, priced: bool) -> None:
    matrix, pair = FORMS[form]
    filters, bias, energy = units(n, dim, n)
    filters[n // 2] = 0
    score, keeper = removal_order(filters, bias, energy, rho=rho, distances=matrix, priced=priced)
    expected, winner = oracle.greedy_removal(filters.numpy(), bias.numpy(), energy.numpy(), rho=rho, distance=pair, priced=priced)
    assert np.allclose(score.numpy(), expected, atol=ROUNDING, rtol=0)
    assert np.array_equal(keeper.numpy(), winner)
    assert torch.equal(spline_scores(filters, bias, energy, rho=rho, distances=matrix, priced=priced), score)


@pytest.mark.parametrize("n_images", [1, 5, 70])  # 70: more than one forward pass
def test_codes_equal_hooks_on_the_relus(n_images: int) -> None:
    model, x = randomised(plain(12, 11)), images(n_images)
    code = activation_code(model, x)
    expected = oracle.relu_code(model, x)
    assert [c.units for c in code.layers] == [bits.shape[1] for bits in expected] == [12 * 64, 11 * 64]
    for layer, bits in zip(code.layers, expected, strict=True):
        assert np.array_equal(unpacked(layer), bits)
        assert layer.bits.dtype == torch.uint8 and layer.bits.shape == (n_images, -(-layer.units // 8))
    assert code.nbytes == sum(n_images * -(-c.units // 8) for c in code.layers)


def test_distance_equals_counting_bits() -> None:
    x = images(9)
    a, b = randomised(plain(12, 11), 0), randomised(plain(12, 11), 1)
    codes = activation_code(a, x), activation_code(b, x)
    bits = oracle.relu_code(a, x), oracle.relu_code(b, x)
    assert code_distance(*codes) == pytest.approx(oracle.code_distance(*bits), abs=ROUNDING)
    joined = [np.concatenate([layer.ravel() for layer in net]) for net in bits]
    assert bit_distance(*codes) == pytest.approx(float((joined[0] != joined[1]).mean()), abs=ROUNDING)
    assert bit_distance(*codes) != code_distance(*codes), "layers of different width weigh differently"


def test_norm_code_is_the_sign_of_every_batch_norm() -> None:
    model, x = randomised(Residual()), images(3)
    outputs: list[Tensor] = []
    norms = [model.norm, model.norm1, model.norm2]
    hooks = [m.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach() > 0)) for m in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    for layer, expected in zip(norm_code(model, x).layers, outputs, strict=True):
        assert np.array_equal(unpacked(layer), oracle.units(expected))
    assert not any(m._forward_hooks for m in model.modules())


def test_relu_code_of_a_residual_net_is_taken_behind_the_sum() -> None:
    """The batch norm of the last convolution is summed with the stream before its ReLU: the two codes differ there."""
    model, x = randomised(Residual()), images(3)
    assert unpacked(activation_code(model, x).layers[2]).mean() > unpacked(norm_code(model, x).layers[2]).mean()


def test_packing_on_a_device_equals_packbits() -> None:
    bits = torch.rand(5, 27, generator=torch.Generator().manual_seed(0)) > 0.5
    assert np.array_equal(spline._pack_on_device(bits).numpy(), np.packbits(bits.numpy(), axis=1))


# ---- however the ReLU is called


class Calls(nn.Module):
    """One gate, called in the way under test on the output of one convolution."""

    def __init__(self, gate: object) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 10, 3), nn.Linear(10, 5)
        self.act = gate if isinstance(gate, nn.Module) else None
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act(x) if self.act is not None else self.gate(x)
        return self.fc(x.mean((2, 3)))


GATES = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "relu6 in place": nn.ReLU6(inplace=True),
    "leaky": nn.LeakyReLU(),
    "leaky in place": nn.LeakyReLU(inplace=True),
    "prelu": nn.PReLU(),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "elu": nn.ELU(inplace=True),
    "mish": nn.Mish(),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu by name": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "F.leaky_relu_": F.leaky_relu_,
    "torch.relu": torch.relu,
    "torch.relu by name": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
}


@pytest.mark.parametrize("name", GATES)
def test_every_way_to_call_a_relu_is_seen_once_and_before_it_acts(name: str) -> None:
    model, x = randomised(Calls(GATES[name])), images(4)
    with torch.no_grad():
        expected = model.conv(x) > 0
    (layer,) = activation_code(model, x).layers
    assert np.array_equal(unpacked(layer), oracle.units(expected))


def test_one_relu_module_called_twice_is_two_layers() -> None:
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), relu, nn.Conv2d(8, 6, 1), relu, nn.Flatten(), nn.Linear(384, 5))
    assert [c.units for c in activation_code(randomised(net), images(2)).layers] == [512, 384]


def test_a_learned_weight_kept_positive_is_no_unit() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.share, self.conv = nn.Parameter(torch.ones(3)), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) * F.relu(self.share)[0]).flatten(1)

    assert [c.units for c in activation_code(randomised(Fused()), images(5)).layers] == [4 * 64]


class Gated(nn.Module):
    """One ReLU sees the images; another a learned table, which is the same whatever the images are."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(6, 10), nn.Linear(entries, entries)
        self.register_buffer("table", torch.randn(entries))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) * F.relu(self.gate(self.table)).mean()


@pytest.mark.parametrize("entries", [5, 16, 64])
def test_a_relu_that_sees_no_image_has_no_units(entries: int) -> None:
    torch.manual_seed(0)
    model, probe = Gated(entries), torch.randn(32, 6)
    (layer,) = activation_code(model, probe).layers
    assert layer.units == 10 and np.array_equal(unpacked(layer), (model.layer(probe) > 0).numpy())


def test_windows_folded_into_the_batch_stay_with_their_image() -> None:
    """A window partition has (N * windows) rows: the code is still one row an image, and as long as all its windows."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(len(x), 3, 4, 2, 8).permute(0, 2, 3, 4, 1).reshape(-1, 16, 3)
            return F.relu(self.fc(x)).view(len(x) // 4, -1)

    model, x = randomised(Windowed()), images(70)
    (layer,) = activation_code(model, x).layers
    assert (layer.units, len(layer.bits)) == (4 * 16 * 6, 70)
    with torch.no_grad():
        assert np.array_equal(unpacked(layer), (model(x) > 0).numpy())
    assert activation_code(model, x, max_bytes=70 * 20).nbytes <= 70 * 20


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid(), nn.Identity()])
def test_a_net_without_relu_is_refused(act: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Flatten(), nn.Linear(144, 5)).double()
    with pytest.raises(UsageError, match=r"Sequential calls no ReLU, .* --detector epoch:5"):
        activation_code(model, images(2))
    with pytest.raises(UsageError, match="has no batch norm"):
        norm_code(model, images(2))


# ---- properties of the code and its distance


def test_the_model_and_the_probe_are_left_as_they_were() -> None:
    model, x = randomised(Residual()), images(3)
    model.train()
    model.norm1.eval()
    modes = [m.training for m in model.modules()]
    state, probe = {n: t.clone() for n, t in model.state_dict().items()}, x.clone()
    random = torch.get_rng_state()
    assert code_distance(activation_code(model, x), activation_code(model, x)) == 0
    norm_code(model, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(x, probe) and torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() and not any(m._forward_hooks for m in model.modules())


def test_modes_come_back_when_the_network_fails() -> None:
    model = randomised(Residual()).train()
    with pytest.raises(RuntimeError):
        activation_code(model, images(2, channels=4))
    assert all(m.training for m in model.modules())
    assert F.relu(torch.tensor(-1.0)) == 0, "no mode is left on"


def test_the_code_does_not_depend_on_how_the_probe_is_cut_into_batches() -> None:
    model, x = randomised(plain(12, 11)), images(70)
    whole = activation_code(model, x)
    parts = [activation_code(model, x[i : i + 7]) for i in range(0, 70, 7)]
    for j, layer in enumerate(whole.layers):
        assert torch.equal(layer.bits, torch.cat([p.layers[j].bits for p in parts]))


def test_the_code_is_that_of_the_folded_network() -> None:
    """Batch norm in eval mode is affine: conv + BN and the folded conv have one code."""
    model, x = randomised(plain(12, 11)), images(8)
    folded = nn.Sequential(*[m for m in plain(12, 11) if not isinstance(m, nn.BatchNorm2d)]).double().eval()
    for i, j in ((0, 0), (3, 2)):
        folded[j] = nn.utils.fusion.fuse_conv_bn_eval(model[i], model[i + 1])
    folded[-1].load_state_dict(model[-1].state_dict())
    assert (
        code_distance(activation_code(model, x), activation_code(folded, x)) < 1e-3
    )  # a unit within rounding of zero may fall on either side


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16))
def test_distance_is_a_share_symmetric_and_obeys_the_triangle(seed: int) -> None:
    x = images(6, seed=seed)
    a, b, c = (activation_code(randomised(plain(9, 10), seed + i), x) for i in range(3))
    for distance in (code_distance, bit_distance):
        assert distance(a, a) == 0
        assert 0 <= distance(a, b) <= 1
        assert distance(a, b) == distance(b, a)
        assert distance(a, c) <= distance(a, b) + distance(b, c) + ROUNDING


def test_opposite_codes_are_at_one() -> None:
    conv = nn.Conv2d(3, 8, 3).double()
    model, x = nn.Sequential(conv, nn.ReLU(), nn.Flatten()), images(5)
    before = activation_code(model, x)
    with torch.no_grad():
        conv.weight.neg_()
        conv.bias.neg_()
    assert code_distance(before, activation_code(model, x)) == 1
    assert bit_distance(before, activation_code(model, x)) == 1


def test_independent_networks_are_half_apart_and_a_turn_is_its_angle_over_pi() -> None:
    """On Gaussian inputs sign(<w, x>) and sign(<v, x>) differ with probability angle / pi."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=g, dtype=torch.float64)
    a, b = (torch.randn(200, 64, generator=g, dtype=torch.float64) for _ in range(2))
    orthogonal = b - (b * a).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a

    def code(weight: Tensor) -> spline.ActivationCode:
        layer = nn.Linear(64, 200, bias=False).double()
        layer.weight.data = weight
        return activation_code(nn.Sequential(layer, nn.ReLU()), x)

    # 200 independent units, a share of 400 images each: standard error below 0.5 / sqrt(200) / sqrt(400) for each unit's angle,
    # and for random pairs the angle itself scatters by about 1 / sqrt(64) / pi / sqrt(200) = 0.003 around a half
    assert code_distance(code(a), code(b)) == pytest.approx(0.5, abs=0.012)
    for degrees in (0, 10, 29, 90, 150):
        angle = np.radians(degrees)
        turned = np.cos(angle) * a / a.norm(dim=1, keepdim=True) + np.sin(angle) * orthogonal / orthogonal.norm(dim=1, keepdim=True)
        # 4 standard errors of a share of 200 x 400 dependent pairs; images are independent, so at worst 0.5 / sqrt(400) / sqrt(200) * a few
        assert code_distance(code(a), code(turned)) == pytest.approx(degrees / 180, abs=0.01)


def test_codes_of_different_probes_or_networks_do_not_compare() -> None:
    model, x = randomised(plain(12, 11)), images(4)
    code = activation_code(model, x)
    for other in (activation_code(model, x[:3]), activation_code(randomised(plain(11, 12)), x), norm_code(randomised(Residual()), x)):
        with pytest.raises(spline.ProbeMismatch, match="one probe and one network"):
            code_distance(code, other)


def test_distances_do_not_depend_on_how_activations_lie_in_memory() -> None:
    one, two, x = randomised(plain(12, 11)), randomised(plain(12, 11), 1), images(70)
    usual = [activation_code(m, x) for m in (one, two)]
    last = [activation_code(m.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)) for m in (one, two)]
    assert all(code_distance(a, b) < 1e-4 for a, b in zip(usual, last, strict=True))  # sums in another order may turn a sign at 0
    assert code_distance(*usual) > 0.1


def test_alive_is_the_share_of_last_units_that_tell_images_apart() -> None:
    model, x = randomised(plain(12, 11)), images(16)
    bits = oracle.relu_code(model, x)
    varying = int((bits[-1] != bits[-1][0]).any(0).sum()) / bits[-1].shape[1]
    assert activation_code(model, x).alive == pytest.approx(varying, abs=ROUNDING)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert activation_code(model, x).alive == 0
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    assert activation_code(model, x).alive == 0


# ---- memory and sampling


@pytest.mark.parametrize(("size", "megabytes"), [(32, 35.4), (28, 26.1)])
def test_vgg16_needs_no_more_than_40_megabytes(size: int, megabytes: float) -> None:
    """256 images, three snapshots in the queue and the newest: a byte for 8 units, measured on 2 images."""
    model = models.build("vgg16", num_classes=10, in_channels=3, image_size=size)
    total = activation_code(model, images(2, 3, size).float()).nbytes * 128 * 4 / 1e6
    assert total == pytest.approx(megabytes, abs=0.1)
    assert total <= 40


@pytest.mark.parametrize("name", ["resnet50", "preresnet-101"])
def test_large_nets_stay_below_the_limit_by_a_subset_of_units(name: str) -> None:
    """As the detector asks for it: a quarter of 100 MB a snapshot; here for 2 images, so 1/128 of that."""
    size = 224 if name == "resnet50" else 32
    model = models.build(name, num_classes=10, in_channels=3, image_size=size)
    x = images(2, 3, size).float()
    limit = 25_000_000 // 128
    code = activation_code(model, x, max_bytes=limit)
    assert 0.9 * limit < code.nbytes <= limit
    again = activation_code(model, x, max_bytes=limit)
    assert code_distance(code, again) == 0, "the subset is the same at every call"


def test_a_subset_keeps_64_units_and_whole_narrow_layers() -> None:
    model, x = randomised(plain(12, 1)), images(3)
    code = activation_code(model, x, max_bytes=10)
    assert [c.units for c in code.layers] == [64, 64]
    full = activation_code(model, x)
    assert np.array_equal(unpacked(code.layers[1]), unpacked(full.layers[1]))


def test_the_error_of_a_subset_is_bounded_as_promised() -> None:
    """At most 1 / (2 sqrt(n)) for n units, as a root mean square over forty layers (each draws its own subset)."""
    x = images(1)
    widths = range(20, 60)

    def codes(seed: int, max_bytes: int | None) -> spline.ActivationCode:
        torch.manual_seed(seed)
        net = nn.ModuleList([nn.Conv2d(3, c, 3, padding=1) for c in widths]).double()

        class Parallel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> list[Tensor]:
                return [F.relu(conv(x)) for conv in self.net]

        return activation_code(Parallel(), x, max_bytes=max_bytes)

    def shares(max_bytes: int | None) -> np.ndarray:
        pairs = spline._differences(codes(0, max_bytes), codes(1, max_bytes))
        return np.array([d / t for d, t in pairs])

    sampled = codes(0, 1000)
    n = np.array([c.units for c in sampled.layers])
    assert n.min() >= 64 and n.max() < 64 * 20
    errors = (shares(1000) - shares(None)) * 2 * np.sqrt(n)
    assert np.abs(errors).max() > 0.1, "a subset is not the whole"
    # a mean of 40 squares of variance at most one has a standard deviation below sqrt(2 / 40) = 0.22
    assert np.square(errors).mean() < 1 + 3 * 0.22


def test_canvas_is_a_grid_of_mixtures() -> None:
    first, second = images(2)
    grid = canvas(first, second, side=3, extent=2.0)
    assert grid.shape == (9, 3, 8, 8)
    expected = [a * first + b * second for a in (-2, 0, 2) for b in (-2, 0, 2)]
    assert torch.allclose(grid, torch.stack(expected), atol=ROUNDING)


# ---- properties of the ranking


@pytest.mark.parametrize("form", FORMS)
def test_distances_are_symmetric_and_zero_for_copies(form: str) -> None:
    filters, bias, _ = units(12, 6, 3)
    filters[7], bias[7] = filters[2], bias[2]
    d = FORMS[form][0](filters, bias)
    assert torch.allclose(d, d.T, atol=ROUNDING)
    assert (d >= 0).all() and d[2, 7] == pytest.approx(0, abs=ROUNDING)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 24), form=st.sampled_from(sorted(FORMS)))
def test_scores_follow_a_permutation_of_the_units(seed: int, n: int, form: str) -> None:
    filters, bias, energy = units(n, 7, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    score, keeper = removal_order(filters, bias, energy, distances=FORMS[form][0])
    moved, moved_keeper = removal_order(filters[order], bias[order], energy[order], distances=FORMS[form][0])
    assert torch.allclose(moved, score[order], atol=ROUNDING)
    back = torch.cat([order, torch.tensor([-1])])  # -1 stays -1
    assert torch.equal(back[moved_keeper], keeper[order])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 24), scale=st.floats(0.01, 100))
def test_a_hyperplane_is_the_same_at_every_scale(seed: int, n: int, scale: float) -> None:
    """(s w, s b) is the hyperplane of (w, b), and (-w, -b) too, though only without a sign."""
    filters, bias, _ = units(n, 7, seed)
    factor = torch.ones(n, 1, dtype=torch.float64)
    factor[::2] = scale
    for distances in (spline.hyperplane_distances, spline.signed_distances):
        assert torch.allclose(distances(filters, bias), distances(factor * filters, factor[:, 0] * bias), atol=1e-9)
    factor[1::2] = -1
    assert torch.allclose(
        spline.hyperplane_distances(filters, bias), spline.hyperplane_distances(factor * filters, factor[:, 0] * bias), atol=1e-9
    )
    if n > 2:
        assert not torch.allclose(
            spline.signed_distances(filters, bias), spline.signed_distances(factor * filters, factor[:, 0] * bias), atol=1e-3
        )


def test_the_published_form_depends_on_the_scale() -> None:
    filters, bias, _ = units(6, 7, 0)
    assert not torch.allclose(spline.published_distances(filters, bias), spline.published_distances(3 * filters, 3 * bias), atol=1e-3)


def test_opposite_units_are_copies_but_not_of_one_sign() -> None:
    filters, bias = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([0.5, -0.5])
    assert spline.hyperplane_distances(filters, bias)[0, 1] == pytest.approx(0, abs=ROUNDING)
    assert spline.signed_distances(filters, bias, rho=0)[0, 1] == pytest.approx(2, abs=ROUNDING)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 24))
def test_scores_rank_the_whole_layer(seed: int, n: int) -> None:
    """Prices never fall below the cheapest pair's, keepers outlive what they keep, and one unit stands last."""
    filters, bias, energy = units(n, 7, seed)
    score, keeper = removal_order(filters, bias, energy)
    d = spline.hyperplane_distances(filters, bias).numpy() * np.minimum.outer(energy.numpy(), energy.numpy())
    smallest = d[~np.eye(n, dtype=bool)].min()
    assert float(score.min()) == pytest.approx(smallest, abs=ROUNDING)
    assert int((keeper == -1).sum()) == 1 and keeper[score.argmax()] == -1
    for u in range(n):
        if keeper[u] >= 0:
            assert d[u, keeper[u]] == pytest.approx(float(score[u]), abs=ROUNDING)
    removed = np.sort(score.numpy())[:-1]
    assert float(score.max()) == pytest.approx(removed[-1] + 1, abs=ROUNDING)


def test_of_a_pair_the_one_with_less_energy_goes() -> None:
    filters, bias = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.zeros(3)
    assert removal_order(filters, bias, torch.tensor([1.0, 2.0, 1.0]))[1].tolist()[0] == 1
    assert removal_order(filters, bias, torch.tensor([3.0, 1.0, 1.0]))[1].tolist()[1] == 0


def test_a_far_unit_that_gives_its_readers_little_goes_before_a_near_one_that_gives_much() -> None:
    filters, bias = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.3, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(3)
    energy = torch.tensor([1.0, 1.0, 1e-3])
    assert spline_scores(filters, bias, energy).argmin() == 2
    assert spline_scores(filters, bias, energy, priced=False).argmin() == 0


def test_constant_units_go_first_and_are_nobodys_copy() -> None:
    filters, bias, energy = units(9, 5, 0)
    filters[[2, 6]] = 0
    for distances, _ in FORMS.values():
        score, keeper = removal_order(filters, bias, energy, distances=distances)
        assert score[[2, 6]].tolist() == [-1, -1] and keeper[[2, 6]].tolist() == [-1, -1]
        assert set(score.argsort()[:2].tolist()) == {2, 6}
        assert torch.isfinite(score).all() and not set(keeper.tolist()) & {2, 6}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_units_and_all_constant(n: int) -> None:
    filters, bias, energy = units(n, 5, 0)
    score, keeper = removal_order(filters, bias, energy)
    assert torch.isfinite(score).all() and int((keeper == -1).sum()) == 1
    score, keeper = removal_order(torch.zeros(n, 5), bias, energy)
    assert score.tolist() == [-1] * n and keeper.tolist() == [-1] * n


def test_exact_copies_leave_deterministically() -> None:
    filters, bias, energy = torch.ones(6, 4), torch.zeros(6), torch.ones(6)
    score, keeper = removal_order(filters, bias, energy)
    assert score.tolist() == [0, 0, 0, 0, 0, 1] and keeper.tolist()[-1] == -1
    assert torch.equal(score, removal_order(filters, bias, energy)[0])


def test_units_that_are_nearly_off_go_first() -> None:
    """An L1 penalty on batch-norm scales leaves them near 0, where the offset b / |w| is of any size."""
    draw = torch.Generator().manual_seed(0)
    filters, bias = torch.randn(32, 9, generator=draw), torch.randn(32, generator=draw) / 10
    filters[[3, 17, 30]] *= 1e-4
    assert sorted(spline_scores(filters, bias, torch.ones(32)).argsort()[:3].tolist()) == [3, 17, 30]
