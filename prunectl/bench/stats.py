"""The arithmetic of a bench: percentiles, integrals of power, intervals of ratios, and what makes a series untrustworthy.

Pure: arrays and numbers in, numbers out, no clock, no random numbers. What cannot be computed raises NotMeasured with the
reason, which ends up in the report beside a null; nothing is ever replaced by 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 is the limit.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
              2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


class NotMeasured(Exception):
    """Why a number is null: a sentence for the report."""


def percentiles(samples: ArrayLike) -> dict[str, float]:
    """p50, p90, p99, mean, std, min, max of the samples, in their unit; quantiles interpolated linearly."""
    x = np.asarray(samples, dtype=np.float64)
    if x.size == 0:
        raise NotMeasured("no samples")
    p50, p90, p99 = np.percentile(x, [50, 90, 99])
    std = float(x.std(ddof=1)) if x.size > 1 else 0.0
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "mean": float(x.mean()), "std": std,
            "min": float(x.min()), "max": float(x.max())}  # fmt: skip


def power_integral_mj(t_ns: ArrayLike, power_mw: ArrayLike, start_ns: int, end_ns: int) -> float:
    """Energy in mJ between two times: trapezoids between the true stamps, the edges interpolated.

    t_ns, power_mw: (n,), stamps increasing. Raises NotMeasured when no sample lies at or beyond an edge."""
    t, p = _seconds(t_ns, start_ns), np.asarray(power_mw, dtype=np.float64)
    end = (end_ns - start_ns) / 1e9
    _need_brackets(t, end)
    inside = (t > 0.0) & (t < end)
    times = np.concatenate([[0.0], t[inside], [end]])
    powers = np.interp(times, t, p)
    return float(((powers[1:] + powers[:-1]) / 2 * np.diff(times)).sum())


def counter_difference_mj(t_ns: ArrayLike, counter_uj: ArrayLike, start_ns: int, end_ns: int, *, wrap_uj: int | None = None) -> float:
    """Energy in mJ between two times of a counter of uJ that starts again at wrap_uj, interpolated at the edges.

    Raises NotMeasured where it did not move, or fell by what is no wrap: half the range between two readings is a reset."""
    t, c = _seconds(t_ns, start_ns), np.asarray(counter_uj, dtype=np.float64)
    end = (end_ns - start_ns) / 1e9
    _need_brackets(t, end)
    steps = np.diff(c, prepend=c[0])
    if (steps < 0).any() and (wrap_uj is None or (steps[steps < 0] + wrap_uj).max() > wrap_uj / 2):
        raise NotMeasured("the energy counter went backwards")
    total = np.cumsum(np.where(steps < 0, steps + (wrap_uj or 0), steps))
    at_start, at_end = np.interp([0.0, end], t, total)
    if at_end <= at_start:
        raise NotMeasured(f"the energy counter did not move in {end:.2f} s: it updates more slowly, or not at all")
    return float(at_end - at_start) / 1e3


def check_stamps(t_ns: ArrayLike, start_ns: int, end_ns: int, *, longest_gap_s: float) -> None:
    """Raises NotMeasured where the stamps of a window do not increase, or leave a gap: a clock that jumped, a sampler that stalled."""
    t = np.asarray(t_ns, dtype=np.int64)
    steps = np.diff(t)
    if (steps <= 0).any():
        i = int(np.argmax(steps <= 0))
        raise NotMeasured(f"the clock of the samples jumped by {steps[i] / 1e9:.3f} s at sample {i + 1}")
    near = (t[1:] > start_ns) & (t[:-1] < end_ns)
    if near.any() and (worst := steps[near].max() / 1e9) > longest_gap_s:
        raise NotMeasured(
            f"no sample for {worst:.2f} s in the window (at most {longest_gap_s:.2f} s allowed): the clock jumped or sampling stalled"
        )


def held_runs(t_ns: ArrayLike, values: ArrayLike) -> Floats:
    """How long the series held each value before it changed, in s; the last entry is the run that was still going on."""
    t, v = np.asarray(t_ns, dtype=np.int64), np.asarray(values, dtype=np.float64)
    if v.size == 0:
        return np.zeros(0)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(v)) + 1])
    ends = np.concatenate([starts[1:], [v.size - 1]])
    return np.asarray((t[ends] - t[starts]) / 1e9, dtype=np.float64)


def refresh_ms(t_ns: ArrayLike, values: ArrayLike) -> float:
    """The sensor's refresh: median time between two changes of its value. An upper bound where the power is constant."""
    runs = held_runs(t_ns, values)[1:-1]  # the first and the last run were cut off
    if runs.size < 3:
        raise NotMeasured(f"the sensor changed {runs.size + 1 if runs.size else 0} times while it was watched: too few to tell its refresh")
    return float(np.median(runs) * 1e3)


def check_alive(windows: Sequence[tuple[ArrayLike, ArrayLike]], *, resting: float | None, step: float | None = None) -> None:
    """Raises NotMeasured for a sensor that stopped updating. windows: (t_ns, values) under load; resting: its last value before;
    step: the sensor's, where it is known.

    Suspicious is a value held for more than 2 s and 20 times longer than usual, by a sensor whose values otherwise move by more
    than three of its steps; a coarse sensor at a steady load holds its value by right. So is a value that load does not change."""
    series = [np.asarray(v, dtype=np.float64) for _, v in windows]
    seen = np.concatenate(series) if series else np.zeros(0)
    if seen.size < 20:
        return
    if seen.min() == seen.max():
        if resting is None or resting == seen[0]:
            raise NotMeasured(f"the sensor gave {seen[0]:g} in all of {seen.size} readings, under load too: it does not update")
        return
    runs = [held_runs(t, v) for t, v in windows]
    complete = np.concatenate([r[:-1] for r in runs])
    worst, usual = max(float(r.max()) for r in runs if r.size), float(np.median(complete))
    # one of every run, so that a long one counts once, around its window's level: two networks differ more than a sensor moves
    each = np.concatenate([v[np.diff(v, prepend=np.nan) != 0] - np.median(v) for v in series if v.size])
    moves = np.percentile(each, 95) - np.percentile(each, 5) > 3 * (step or quantum(seen))
    if moves and worst > max(2.0, 20 * usual):
        raise NotMeasured(f"the sensor held one value for {worst:.1f} s and usually changes every {usual:.2f} s: it stopped updating")


def quantum(values: ArrayLike) -> float:
    """The smallest step between two values the sensor gave: what it cannot see below. Raises NotMeasured if it gave one value."""
    distinct = np.unique(np.asarray(values, dtype=np.float64))
    if distinct.size < 2:
        raise NotMeasured("the sensor gave a single value")
    return float(np.diff(distinct).min())


def confidence_95(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the centre of positive samples: Student's t on their logarithms, widened to hold the median.

    On logarithms, because times, energies and their ratios scatter by factors. Not the bootstrap: resampling 3 or 5 repeats
    covers 75 % or 94 %, and claims savings that are not there. Raises NotMeasured below 3 samples."""
    x = np.asarray(samples, dtype=np.float64)
    if x.size < 3:
        raise NotMeasured(f"{x.size} repeats: an interval needs 3")
    if not (x > 0).all():
        raise NotMeasured("not all samples are positive")
    logs = np.log(x)
    half = STUDENT_95[min(x.size - 1, len(STUDENT_95)) - 1] * logs.std(ddof=1) / math.sqrt(x.size)
    middle, median = float(logs.mean()), float(np.median(x))
    return min(math.exp(middle - half), median), max(math.exp(middle + half), median)


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of each repeat: neighbours in time share temperature and clocks, so they are compared with each other.

    Raises NotMeasured where a denominator is 0."""
    if 0 in denominator:
        raise NotMeasured("what it is compared with took nothing")
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def drift(samples: ArrayLike) -> float:
    """How much the last quarter's median exceeds the first quarter's, as a share of it; 0 below 8 samples."""
    x = np.asarray(samples, dtype=np.float64)
    quarter = x.size // 4
    return 0.0 if quarter < 2 else float(np.median(x[-quarter:]) / np.median(x[:quarter]) - 1.0)


def at_fixed_rate_mj(dynamic_mj: float, idle_mw: float, rate_per_s: float) -> float:
    """Energy of one inference when they come at a fixed rate: its own, and its share of the idle power until the next one."""
    return dynamic_mj + idle_mw / rate_per_s


def _seconds(t_ns: ArrayLike, start_ns: int) -> Floats:
    """Seconds since start_ns; subtracted as integers first, so that nothing of a large stamp is rounded away."""
    return np.asarray((np.asarray(t_ns, dtype=np.int64) - start_ns) / 1e9, dtype=np.float64)


def _need_brackets(t: Floats, end: float) -> None:
    if t.size < 2 or t[0] > 0.0 or t[-1] < end:
        raise NotMeasured("the samples do not reach over the whole window")
