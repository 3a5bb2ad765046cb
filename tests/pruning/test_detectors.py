"""Detectors: the contract that all share, then each one's rule against plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_nets import Residual, images, plain, randomised
from torch import nn

from prunectl.errors import UnknownName, UsageError
from prunectl.pruning.detectors import MIN_ALIVE, Detector, EarlyBird, Epi, Epoch, Reading, Spline, detectors, parse
from prunectl.pruning.spline import activation_code, code_distance, norm_code

PROBE = images(24)
BUILD: dict[str, Callable[[], Detector]] = {
    "spline": lambda: Spline(),
    "early-bird": lambda: EarlyBird(sparsity=0.5),
    "epi": lambda: Epi(sparsity=0.5),
    "epoch": lambda: Epoch(at=3),
}
STRUCTURAL = ["spline", "early-bird", "epi"]  # epoch:N looks at nothing


def network(seed: int) -> nn.Module:
    """Filters and gammas of very different sizes, so that every seed has its own mask and its own widths."""
    model = randomised(plain(24, 32), seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(torch.rand(1, generator=g) * torch.randn(len(m.weight), 1, 1, 1, generator=g).exp())
    return model


def settling(seed: int = 0, steps: int = 20) -> Iterator[nn.Module]:
    """A network on its way from one set of weights to another, in steps that shrink by a third."""
    model, goal = network(seed), network(seed + 1)
    for _ in range(steps):
        yield model
        with torch.no_grad():
            for p, q in zip(model.parameters(), goal.parameters(), strict=True):
                p.lerp_(q, 1 / 3)


def watch(detector: Detector, models: list[nn.Module]) -> list[Reading]:
    return [detector.observe(float(i), m, PROBE) for i, m in enumerate(models)]


# ---- the contract


def test_every_detector_is_covered() -> None:
    assert set(BUILD) == set(detectors.names())


@pytest.mark.parametrize("name", STRUCTURAL)
def test_identical_networks_are_at_distance_zero(name: str) -> None:
    detector = BUILD[name]()
    readings = watch(detector, [network(0)] * (detector.window + 3))  # type: ignore[attr-defined]
    assert readings[0].distances == () and readings[0].max is None
    assert all(d == 0 for r in readings for d in r.distances)
    assert [len(r.distances) for r in readings][: detector.window + 1] == list(range(detector.window + 1))  # type: ignore[attr-defined]
    assert [len(r.distances) for r in readings][-1] == detector.window  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", STRUCTURAL)
@pytest.mark.parametrize("seed", range(4))
def test_independent_networks_do_not_fire(name: str, seed: int) -> None:
    readings = watch(BUILD[name](), [network(100 * seed + i) for i in range(14)])
    assert not any(r.fires for r in readings)
    assert all(r.max for r in readings[1:])


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_network_that_settles_fires_after_its_window_is_full(name: str) -> None:
    detector = BUILD[name]()
    readings = watch(detector, [copy.deepcopy(m) for m in settling()])
    first = next(i for i, r in enumerate(readings) if r.fires)
    assert first >= detector.window  # type: ignore[attr-defined]
    assert readings[first].max == max(readings[first].distances)


def constant(model: nn.Module, value: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


@pytest.mark.parametrize("name", STRUCTURAL)
@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan])
def test_a_dead_or_constant_network_does_not_fire(name: str, value: float) -> None:
    """Whether it was so from the start, or became so in the middle of a run."""
    still = constant(network(0), value)
    if name == "spline" and value == 1.0:
        still = constant(network(0), -1.0)  # every unit off, for every image: equal weights alone still cut space
        still[1].running_mean.zero_()
        still[1].bias.data.fill_(-100)
        still[4].bias.data.fill_(-100)
    for before in ([], [network(i) for i in range(7)], [copy.deepcopy(m) for m in settling(steps=4)]):
        readings = watch(BUILD[name](), [*before, *[still] * 12])
        assert not any(r.fires for r in readings[len(before) :])


@pytest.mark.parametrize("norm", [1, 4])
def test_one_dead_layer_makes_a_dead_network(norm: int) -> None:
    """However lively the others are: what lies behind it is the same for every image."""
    still = network(0)
    assert any(r.fires for r in watch(Spline(), [still] * 6))
    still[norm].running_mean.zero_()
    still[norm].bias.data.fill_(-1e6)
    assert not any(r.fires for r in watch(Spline(), [still] * 6))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("cut", [0, 2, 6, 11])
def test_state_and_restore_continue_as_if_never_interrupted(name: str, cut: int) -> None:
    models = [copy.deepcopy(m) for m in settling(steps=16)]
    whole = watch(BUILD[name](), models)
    first, second = BUILD[name](), BUILD[name]()
    watch(second, models[5:7])  # what it held before is forgotten
    head = watch(first, models[:cut])
    second.restore(safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in first.state().items()})))
    tail = [second.observe(float(i), m, PROBE) for i, m in enumerate(models) if i >= cut]
    assert [*head, *tail] == whole


@pytest.mark.parametrize("name", BUILD)
def test_restoring_nothing_starts_afresh(name: str) -> None:
    detector = BUILD[name]()
    watch(detector, [network(0), network(1)])
    detector.restore({})
    assert watch(detector, [network(2)])[0].distances == ()


@pytest.mark.parametrize("name", BUILD)
def test_two_detectors_in_one_process_do_not_influence_each_other(name: str) -> None:
    a, b = ([copy.deepcopy(m) for m in settling(seed, steps=8)] for seed in (0, 7))
    alone = watch(BUILD[name](), a), watch(BUILD[name](), b)
    one, two = BUILD[name](), BUILD[name]()
    together = [(one.observe(float(i), m, PROBE), two.observe(float(i), n, PROBE)) for i, (m, n) in enumerate(zip(a, b, strict=True))]
    assert [list(t) for t in zip(*together, strict=True)] == [list(r) for r in alone]


@pytest.mark.parametrize("name", BUILD)
def test_the_network_is_left_as_it_was(name: str) -> None:
    model = randomised(Residual()).train()
    model.norm1.eval()
    modes, state = [m.training for m in model.modules()], {n: t.clone() for n, t in model.state_dict().items()}
    detector = BUILD[name]()
    detector.observe(0.0, model, PROBE)
    held = {n: t.clone() for n, t in detector.state().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)  # the snapshot is a copy
    assert all(torch.equal(t, held[n]) for n, t in detector.state().items())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.named_buffers())


@pytest.mark.parametrize(("name", "lacks"), [("early-bird", "batch-norm scales"), ("epi", "convolutions")])
def test_a_network_without_norms_or_convolutions_is_refused(name: str, lacks: str) -> None:
    """Its masks would never change, and no training would make them: nobody should wait for that."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    with pytest.raises(UsageError, match=f"{lacks}.*has none"):
        watch(BUILD[name](), [model])


# ---- spline


@pytest.mark.parametrize(("code", "take"), [("relu", activation_code), ("bn", norm_code)])
def test_spline_distances_are_those_of_the_codes_newest_first(code: str, take: Callable[..., object]) -> None:
    models = [copy.deepcopy(m) for m in settling(steps=7)]
    readings = watch(Spline(code=code, eps=0.1), models)
    codes = [take(m, PROBE) for m in models]
    for i, r in enumerate(readings):
        expected = tuple(code_distance(codes[i], codes[j]) for j in range(i - 1, max(-1, i - 4), -1))  # type: ignore[arg-type]
        assert r.distances == expected
        assert r.fires == (len(expected) == 3 and max(expected) < 0.1)


def test_spline_needs_the_largest_distance_strictly_below_eps() -> None:
    models = [copy.deepcopy(m) for m in settling(steps=4)]
    largest = watch(Spline(), models)[-1].max
    assert largest is not None and largest > 0
    assert not watch(Spline(eps=largest), models)[-1].fires
    assert watch(Spline(eps=np.nextafter(largest, 1)), models)[-1].fires


@pytest.mark.parametrize("window", [1, 2, 5])
def test_spline_waits_for_its_window(window: int) -> None:
    readings = watch(Spline(window=window), [network(0)] * 8)
    assert [r.fires for r in readings] == [i >= window for i in range(8)]


def test_spline_counts_a_network_with_too_few_live_units_as_dead() -> None:
    """Ten of 1000 units tell the images apart: at the limit; with nine the network is dead."""
    probe = torch.tensor([[1.0], [-1.0]]).view(2, 1, 1, 1)

    def live(n: int) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1000), nn.ReLU())
        net[1].weight.data = torch.cat([torch.ones(n, 1), torch.zeros(1000 - n, 1)])
        net[1].bias.data.zero_()
        return net

    assert MIN_ALIVE == 0.01
    for n, fires in ((9, False), (10, True)):
        detector = Spline()
        assert [detector.observe(i, live(n), probe).fires for i in range(4)][-1] == fires


def test_spline_keeps_all_codes_within_its_memory() -> None:
    detector = Spline(window=3, max_bytes=4 * 1000)
    watch(detector, [network(i) for i in range(5)])
    held = sum(t.numel() for name, t in detector.state().items() if "units" not in name)
    assert 0.8 * 3000 < held <= 3000, "three snapshots; the fourth is the one being taken"


def test_settings_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UsageError, match="code 'sign': expected relu or bn"):
        Spline(code="sign")
    for build in (Spline, lambda window: EarlyBird(sparsity=0.5, window=window), lambda window: Epi(sparsity=0.5, window=window)):
        with pytest.raises(UsageError, match="window = 0: must be at least 1"):
            build(window=0)


# ---- early bird


def gammas(values: list[list[float]]) -> nn.Module:
    net = nn.Sequential(*[nn.BatchNorm2d(len(v)) for v in values])
    for m, v in zip(net, values, strict=True):
        m.weight.data = torch.tensor(v)
    return net


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), sparsity=st.floats(0.05, 0.95))
def test_early_bird_equals_sorting_all_gammas(seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    history = [[rng.normal(size=5).tolist(), rng.normal(size=9).tolist()] for _ in range(4)]
    readings = watch(EarlyBird(sparsity=sparsity, window=3), [gammas(h) for h in history])
    masks = []
    for layers in history:
        flat = [abs(np.float32(v)) for layer in layers for v in layer]
        threshold = sorted(flat)[int(sparsity * len(flat))]
        masks.append([v > threshold for v in flat])
    for i, r in enumerate(readings):
        expected = [sum(a != b for a, b in zip(masks[i], masks[j], strict=True)) / 14 for j in range(i - 1, max(-1, i - 4), -1)]
        assert r.distances == pytest.approx(expected, abs=1e-6)  # float32 means
    assert readings[3].fires == (max(readings[3].distances) < 0.1 and any(masks[3]))


def test_early_bird_ignores_the_sign_of_gamma() -> None:
    net, flipped = gammas([[0.1, -0.5, 2.0, -3.0]]), gammas([[-0.1, 0.5, -2.0, 3.0]])
    assert watch(EarlyBird(sparsity=0.5), [net, flipped])[1].distances == (0.0,)


def test_early_bird_at_a_constant_initialisation_is_not_converged_and_not_near_a_real_mask() -> None:
    start = gammas([[0.5] * 8])
    assert not any(r.fires for r in watch(EarlyBird(sparsity=0.5, window=2), [start] * 6))
    trained = gammas([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    assert watch(EarlyBird(sparsity=0.5, window=2), [start, trained])[1].distances == (0.375,)  # three of eight stay above the median


# ---- EPI


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), sparsity=st.floats(0.05, 0.95))
def test_epi_equals_loops_over_layers(seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    history = [[rng.normal(size=(6, 2, 1, 1)), rng.normal(size=(9, 6, 1, 1))] for _ in range(5)]

    def net(filters: list[np.ndarray]) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 9, 1))
        for layer, w in zip(model, filters, strict=True):
            layer.weight.data = torch.tensor(w)
        return model

    readings = watch(Epi(sparsity=sparsity, window=3), [net(f) for f in history])
    widths = []
    for filters in history:
        norms = [np.abs(w).mean((1, 2, 3)) for w in filters]
        flat = sorted(np.concatenate(norms))
        widths.append([int((n > flat[int(sparsity * len(flat))]).sum()) for n in norms])
    for i, r in enumerate(readings):
        expected = []
        for j in range(i - 1, max(-1, i - 4), -1):
            layers = [abs(a - b) / (a + b) if a + b else 0.0 for a, b in zip(widths[i], widths[j], strict=True)]
            expected.append(sum(layers) / len(layers))
        assert r.distances == pytest.approx(expected, abs=1e-6)  # float32 means


def with_widths(kept: int) -> nn.Module:
    """Two layers of 10 filters, of which a global threshold at one half keeps `kept` and 9 - kept."""
    net = nn.Sequential(nn.Conv2d(1, 10, 1), nn.Conv2d(1, 10, 1))
    for layer, n in zip(net, (kept, 9 - kept), strict=True):
        layer.weight.data = torch.tensor([2.0 + i / 100 for i in range(n)] + [0.5 + i / 100 for i in range(10 - n)]).view(10, 1, 1, 1)
    return net


def test_epi_fires_above_tau_and_above_the_five_values_before() -> None:
    """Widths jump for five probes, then hold: with a window of 2 the mean stability is 1 from the third equal probe on."""
    sequence = [with_widths(k) for k in (1, 8, 1, 8, 1, 8, 1, 4, 4, 4, 4, 4)]
    readings = watch(Epi(sparsity=0.5, tau=0.983, window=2), sequence)
    assert [i for i, r in enumerate(readings) if r.fires] == [9]
    assert not any(r.fires for r in watch(Epi(sparsity=0.5, tau=1.0, window=2), sequence))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_soonest_is_the_first_look_that_can_fire(window: int) -> None:
    for mask in (Spline(eps=1.1, window=window), EarlyBird(sparsity=0.5, eps=1.1, window=window)):
        assert [r.fires for r in watch(mask, [network(i) for i in range(mask.soonest)])] == [False] * window + [True]
    epi = Epi(sparsity=0.5, window=window)
    restless = [with_widths((1, 8)[i % 2]) for i in range(epi.soonest - window - 1)]
    assert [r.fires for r in watch(epi, [*restless, *[with_widths(4)] * (window + 1)])] == [False] * (epi.soonest - 1) + [True]
    assert Epoch(at=0).soonest == 1


def test_epi_needs_five_values_before() -> None:
    assert not any(r.fires for r in watch(Epi(sparsity=0.5, window=2), [with_widths(k) for k in (1, 8, 1, 8, 4, 4, 4)]))


# ---- names


def test_epoch_fires_from_its_moment_on() -> None:
    detector = Epoch(at=1.5)
    assert [detector.observe(e, nn.Identity(), PROBE).fires for e in (0.5, 1.0, 1.5, 2.0)] == [False, False, True, True]
    assert Epoch(at=1 / 3).observe(0.333333, nn.Identity(), PROBE).fires is False
    assert Epoch(at=0.333333).observe(0.333333, nn.Identity(), PROBE).fires is True


@pytest.mark.parametrize("spec", ["epoch:", "epoch", "epoch:five", "epoch:-1", "epoch:nan", "epoch:inf", "spline:3", "epi:0.9"])
def test_a_detector_spec_that_means_nothing_is_refused(spec: str) -> None:
    def build() -> Detector:
        name, options = parse(spec)
        return detectors.get(name)(**options)

    with pytest.raises(UsageError, match=r"e\.g\. epoch:"):
        build()


def test_detector_specs() -> None:
    assert parse("epoch:2.5") == ("epoch", {"at": 2.5})
    with pytest.raises(UsageError, match="leave eps out"):
        parse("epoch:2.5", eps=0.1)
    assert parse("Early_Bird", eps=0.1) == ("early-bird", {"eps": 0.1})
    with pytest.raises(UnknownName, match="did you mean spline"):
        parse("splin")
