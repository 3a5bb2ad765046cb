"""The arithmetic: against slow obvious versions, exact integrals, and simulated sensors over a minute."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_board import Waveform

from prunectl.bench import stats
from prunectl.bench.stats import NotMeasured

S = 1_000_000_000  # a second in ns


# ------------------------------------------------------------------------------------------------------------- energy


def test_trapezoid_of_a_line_is_exact():
    t = np.array([0, 1, 3, 4, 10]) * S
    power = 100 + 10 * t / S
    assert stats.power_integral_mj(t, power, S // 2, 9 * S) == pytest.approx(100 * 8.5 + 5 * (81 - 0.25))  # edges lie between samples


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1e5)), min_size=3, max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_trapezoid_equals_the_sum_of_its_parts(steps, a, b):
    """Additive over adjoining windows, and scaling with power: what makes it an integral."""
    t = np.cumsum([dt for dt, _ in steps])
    p = np.array([mw for _, mw in steps])
    cuts = sorted(int(t[0] + share * (t[-1] - t[0])) for share in (0.0, a, b, 1.0))
    parts = [stats.power_integral_mj(t, p, x, y) for x, y in itertools.pairwise(cuts)]
    whole = stats.power_integral_mj(t, p, cuts[0], cuts[-1])
    assert sum(parts) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert stats.power_integral_mj(t, 3 * p, cuts[0], cuts[-1]) == pytest.approx(3 * whole, rel=1e-9, abs=1e-9)


def test_large_stamps_lose_nothing():
    """A board that is up for a year: its stamps have no room for ns in a float, their differences do."""
    t = 365 * 24 * 3600 * S + np.arange(0, 10 * S, S // 20)
    assert stats.power_integral_mj(t, np.full(t.shape, 1000.0), int(t[3]) + 1, int(t[-2])) == pytest.approx(
        (int(t[-2]) - int(t[3]) - 1) / 1e6, rel=1e-12
    )


@pytest.mark.parametrize(("start", "end"), [(-1, 5 * S), (5 * S, 10 * S + 1)])
def test_a_window_beyond_the_samples_has_no_energy(start, end):
    with pytest.raises(NotMeasured, match="do not reach"):
        stats.power_integral_mj(np.arange(11) * S, np.ones(11), start, end)


def simulated(wave: Waveform, refresh_s: float, seed: int, *, averaging: bool, window_s: float = 60.0) -> float:
    """Relative error of the energy of a window, as a 20 Hz sampler with a jittering period reads it from a sensor."""
    rng = random.Random(seed)
    phase = rng.uniform(0, refresh_s)
    t = 0.0
    stamps, values = [], []
    while t < window_s + 4:
        k = math.floor((t + phase) / refresh_s)  # the last refresh before t
        shown = k * refresh_s - phase
        mean = wave.integral(shown - refresh_s, shown) / refresh_s if averaging else wave.at(shown)
        stamps.append(int(t * 1e9) + 5 * S)
        values.append(round(mean / 4) * 4)  # a sensor's step of 4 mW
        t += 0.05 * rng.uniform(0.8, 1.6)
    start, end = 5 * S + 2 * S, 5 * S + int((2 + window_s) * 1e9)
    energy = stats.power_integral_mj(stamps, values, start, end)
    return energy / wave.integral(2.0, 2.0 + window_s) - 1


@pytest.mark.parametrize(("refresh_s", "bound"), [(0.05, 0.01), (0.45, 0.03)])
def test_a_minute_of_20_waveforms(refresh_s, bound):
    errors = [abs(simulated(Waveform.random(seed), refresh_s, seed, averaging=True)) for seed in range(20)]
    assert max(errors) < bound
    assert np.median(errors) < bound / 5


def test_what_an_instantaneous_sensor_misses():
    """A sensor that does not average, beside a load that beats with its refresh: the reason why the averaging matters."""
    beat = Waveform(4000, (), (4000, 0.451, 0.5))  # a square wave as long as the refresh: seen at one point, of unknown phase
    instantaneous = [abs(simulated(beat, 0.45, seed, averaging=False)) for seed in range(20)]
    averaging = [abs(simulated(beat, 0.45, seed, averaging=True)) for seed in range(20)]
    assert max(instantaneous) > 0.2
    assert max(averaging) < 0.03


def test_a_counter_that_wraps():
    counter = [900, 950, 20, 80]  # uJ, starting again at 1000
    t = np.arange(4) * S
    assert stats.counter_difference_mj(t, counter, 0, 3 * S, wrap_uj=1000) == pytest.approx(0.180)
    assert stats.counter_difference_mj(t, counter, S // 2, 3 * S, wrap_uj=1000) == pytest.approx(0.155)
    with pytest.raises(NotMeasured, match="went backwards"):
        stats.counter_difference_mj(t, counter, 0, 3 * S)


def test_a_counter_that_is_reset_or_stands_still_has_no_energy():
    """A driver that starts anew is no wrap, which loses a small part of the range between two readings."""
    t = np.arange(4) * S
    with pytest.raises(NotMeasured, match="went backwards"):
        stats.counter_difference_mj(t, [100, 110, 1, 2], 0, 3 * S, wrap_uj=1000)
    with pytest.raises(NotMeasured, match="did not move"):
        stats.counter_difference_mj(t, [5, 5, 5, 5], 0, 3 * S, wrap_uj=1000)


def test_a_ratio_to_nothing_is_not_measured():
    with pytest.raises(NotMeasured, match="took nothing"):
        stats.paired_ratios([1.0, 2.0], [1.0, 0.0])


# ------------------------------------------------------------------------------------------------- series and their faults


def test_a_clock_that_jumps():
    t = np.arange(0, 10 * S, S // 20)
    stats.check_stamps(t, S, 9 * S, longest_gap_s=1.0)
    for jump in (-30 * S, 0 * S - S // 20):
        jumped = t.copy()
        jumped[100:] += jump
        with pytest.raises(NotMeasured, match="clock of the samples jumped"):
            stats.check_stamps(jumped, S, 9 * S, longest_gap_s=1.0)
    forward = t.copy()
    forward[100:] += 30 * S
    with pytest.raises(NotMeasured, match=r"no sample for 30\.05 s"):
        stats.check_stamps(forward, S, 39 * S, longest_gap_s=1.0)
    stats.check_stamps(forward, 6 * S + 30 * S, 39 * S, longest_gap_s=1.0)  # a window the gap is not in


def load(values, seconds=30.0):
    values = np.asarray(values, dtype=float)
    return (np.linspace(0, seconds, values.size) * S).astype(np.int64), values


def test_a_sensor_that_stops_updating():
    rng = np.random.default_rng(0)
    live = np.repeat(rng.normal(6000, 300, 300), 2)  # 30 s at 20 Hz, a new number every 100 ms
    stats.check_alive([load(live)], resting=2000.0)
    stuck = live.copy()
    stuck[300:] = stuck[300]
    with pytest.raises(NotMeasured, match=r"held one value for 1[45]\.\d s"):
        stats.check_alive([load(stuck)], resting=2000.0)


def test_a_sensor_that_load_does_not_move():
    with pytest.raises(NotMeasured, match="under load too"):
        stats.check_alive([load(np.full(600, 1876.0))], resting=1876.0)
    stats.check_alive([load(np.full(600, 7300.0))], resting=1876.0)  # a coarse sensor at a steady load


def test_a_coarse_sensor_at_a_steady_load_is_not_accused():
    """76 mW steps, noise below one of them: the number stands for seconds, then flickers. That is no fault."""
    rng = np.random.default_rng(1)
    power = 7000 + 40 * np.sin(np.linspace(0, 6, 1200)) + rng.normal(0, 6, 1200)
    values = np.round(power / 76) * 76
    assert stats.held_runs(*load(values, 60.0)).max() > 2.0
    stats.check_alive([load(values, 60.0)], resting=1876.0)


def test_two_networks_of_different_power_do_not_make_a_coarse_sensor_stuck():
    rng, windows = np.random.default_rng(3), []
    for level in (8000, 6500) * 5:
        t, values = load(np.round((level + rng.normal(0, 6, 1200) + 20 * np.sin(np.linspace(0, 6, 1200))) / 76) * 76, 60.0)
        windows.append((t + len(windows) * 65 * S, values))
    stats.check_alive(windows, resting=1900.0)
    noisy = [(t, v + np.repeat(rng.normal(0, 300, 600), 2)) for t, v in windows]
    stats.check_alive(noisy, resting=1900.0)
    noisy[3][1][600:] = noisy[3][1][600]  # half of one window
    with pytest.raises(NotMeasured, match="stopped updating"):
        stats.check_alive(noisy, resting=1900.0)


def test_a_step_that_is_known_is_the_step():
    """Volts that flicker make products of volts and amperes differ by less than what one bit of the amperes is worth."""
    values = np.where((np.arange(1200) < 600) & (np.arange(1200) % 4 < 2), 7016.0, 7000.0)  # flickers for half of the window
    values[800] = 7000.9
    with pytest.raises(NotMeasured, match="stopped updating"):
        stats.check_alive([load(values, 60.0)], resting=1900.0)
    stats.check_alive([load(values, 60.0)], resting=1900.0, step=40.0)


@pytest.mark.parametrize("refresh_s", [0.05, 0.11, 0.45])
def test_refresh_from_close_watching(refresh_s):
    t = np.arange(0, 5, 0.0103)
    values = np.random.default_rng(2).normal(5000, 100, 200)[np.floor(t / refresh_s).astype(int)]
    assert stats.refresh_ms((t * S).astype(np.int64), values) == pytest.approx(refresh_s * 1e3, abs=11)  # it is watched every 10.3 ms
    with pytest.raises(NotMeasured, match="too few"):
        stats.refresh_ms((t * S).astype(np.int64), np.ones(t.size))


def test_quantum():
    assert stats.quantum([1000, 1152, 1076, 1304]) == 76
    with pytest.raises(NotMeasured):
        stats.quantum([5, 5, 5])


def test_drift():
    assert stats.drift(np.full(100, 5.0)) == 0
    assert stats.drift(np.concatenate([np.full(50, 5.0), np.full(50, 5.5)])) == pytest.approx(0.1)
    assert stats.drift([1, 2, 3]) == 0


def test_energy_at_a_fixed_rate_adds_the_wait():
    assert stats.at_fixed_rate_mj(dynamic_mj=10.0, idle_mw=2000.0, rate_per_s=100.0) == 10.0 + 20.0


# --------------------------------------------------------------------------------------------- percentiles and intervals


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=200))
def test_percentiles_by_sorting(samples):
    found, ordered = stats.percentiles(samples), sorted(samples)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert found[name] == pytest.approx(low + (high - low) * (place - math.floor(place)), rel=1e-9)
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])


def test_no_samples_no_percentiles():
    with pytest.raises(NotMeasured):
        stats.percentiles([])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_19_times_in_20(n):
    """5 % of the intervals may miss; 1000 trials scatter by 0.7 points. The bootstrap would miss 25 % at n = 3."""
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(1000):
        low, high = stats.confidence_95(0.5 * np.exp(rng.normal(0, 0.03, n)))
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / 1000 <= 0.985


def test_an_interval_needs_three_positive_samples():
    for samples in ([], [1.0, 1.1], [1.0, 1.1, 0.0]):
        with pytest.raises(NotMeasured):
            stats.confidence_95(samples)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=40), st.floats(0.1, 10))
def test_the_interval_holds_the_median_and_scales(samples, factor):
    low, high = stats.confidence_95(samples)
    assert low <= np.median(samples) <= high
    scaled = stats.confidence_95([factor * s for s in samples])
    assert scaled == pytest.approx((factor * low, factor * high), rel=1e-9)


def test_paired_ratios_cancel_what_both_share():
    """A drift of 30 % in both series: each pair still says 0.5."""
    heat = np.linspace(1.0, 1.3, 5)
    assert stats.paired_ratios(list(5 * heat), list(10 * heat)) == pytest.approx([0.5] * 5)
