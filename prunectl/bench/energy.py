"""Joules of the windows of a RawBench: which rails count, whether their readings can be trusted, and what they add up to.

The headline is the power of the whole module; a rail is never added to one that feeds it. A window whose readings cannot be
trusted has no energy and a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prunectl.bench import stats
from prunectl.bench.records import Power, Rail, RawBench, Training, Window
from prunectl.bench.stats import NotMeasured

# Rails that together are the whole module, by board (Jetson Linux Developer Guide, "Power and performance"):
WHOLE_MODULE = (
    ("VDD_IN",),  # TX2, Xavier NX, Orin NX, Orin Nano
    ("POM_5V_IN",),  # TX1, Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
    ("gpu",),  # a desktop GPU, by NVML: the card without its host
)


def headline(rails: Iterable[Rail]) -> list[str]:
    """Names of the rails that add up to the whole module. Raises NotMeasured where none are known to."""
    names = [rail.name for rail in rails]
    for group in WHOLE_MODULE:
        if set(group) <= set(names):
            return list(group)
    packages = [name for name in names if name.startswith("package-")]
    if packages:
        return packages  # Intel and AMD: every socket
    raise NotMeasured(f"none of the rails is known to carry the whole module: {', '.join(names)}")


def longest_gap_s(power: Power) -> float:
    """The pause between two samples that is still sampling: 20 periods, at least 1 s."""
    return max(1.0, 20 * (power.period_ms or 50.0) / 1e3)


def readings(power: Power, rail: str) -> tuple[np.ndarray, np.ndarray]:
    """(t_ns, values) of one rail without the times at which it did not answer."""
    t, values = np.asarray(power.t_ns, dtype=np.int64), power.values[rail]
    answered = np.array([value is not None for value in values], dtype=bool)
    return t[answered], np.array([value for value in values if value is not None], dtype=np.float64)


def rail_energy_mj(power: Power, rail: Rail, window: Window) -> float:
    """Energy of one rail over a window in mJ. Raises NotMeasured."""
    t, values = readings(power, rail.name)
    if rail.unit == "mW" or power.period_ms is not None:  # else a counter that is read at the edges of windows only
        stats.check_stamps(t, window.start_ns, window.end_ns, longest_gap_s=longest_gap_s(power))
    if rail.unit == "uJ":
        return stats.counter_difference_mj(t, values, window.start_ns, window.end_ns, wrap_uj=rail.wrap)
    return stats.power_integral_mj(t, values, window.start_ns, window.end_ns)


def window_energy_mj(raw: RawBench, window: Window) -> float:
    """Energy of the whole module over a window in mJ. Raises NotMeasured with the reason."""
    power = raw.power
    if power.source is None:
        raise NotMeasured(power.reason or "no power sensor")
    rails = {rail.name: rail for rail in power.rails}
    whole = [rails[name] for name in headline(power.rails)]
    if all(rail.unit == "mW" for rail in whole):
        check_alive(raw, whole)
    return sum(rail_energy_mj(power, rail, window) for rail in whole)


def check_alive(raw: RawBench, whole: Sequence[Rail]) -> None:
    """Raises NotMeasured where the module's power stood still under load, which it does not; one of several rails may rest."""
    together = tuple(None if None in row else sum(row) for row in zip(*(raw.power.values[rail.name] for rail in whole), strict=True))
    t, values = readings(dataclasses.replace(raw.power, values={"module": together}), "module")
    step = whole[0].step_mw if len(whole) == 1 else None
    busy = [w for w in raw.windows if w.kind in ("load", "train")]
    inside = [(t >= w.start_ns) & (t <= w.end_ns) for w in busy]
    before = values[t < min((w.start_ns for w in busy), default=0)]
    resting = float(before[-1]) if before.size else None
    stats.check_alive([(t[i], values[i]) for i in inside], resting=resting, step=step)


def mean_power_mw(raw: RawBench, window: Window) -> float:
    if window.end_ns == window.start_ns:
        raise NotMeasured(f"the {window.kind} window is empty")
    return window_energy_mj(raw, window) / ((window.end_ns - window.start_ns) / 1e9)


def idle_mw(raw: RawBench) -> float:
    """Power of the whole module with nothing to do. Raises NotMeasured."""
    windows = [w for w in raw.windows if w.kind == "idle"]
    if not windows:
        raise NotMeasured("no idle window")
    return float(np.median([mean_power_mw(raw, w) for w in windows]))


def refresh_ms(raw: RawBench) -> float:
    """The headline sensor's refresh, from the window in which it was watched closely. Raises NotMeasured."""
    windows = [w for w in raw.windows if w.kind == "refresh"]
    if not windows or raw.power.source is None:
        raise NotMeasured("the sensor's refresh was not watched")
    t, values = readings(raw.power, headline(raw.power.rails)[0])
    inside = (t >= windows[0].start_ns) & (t <= windows[0].end_ns)
    return stats.refresh_ms(t[inside], values[inside])


def quantum_mw(raw: RawBench) -> float:
    """The headline sensor's resolution, where the board told it, else the smallest step it shows. Raises NotMeasured."""
    names = headline(raw.power.rails)
    rail = next(r for r in raw.power.rails if r.name == names[0])
    if rail.unit != "mW":
        raise NotMeasured("the sensor is a counter")
    return rail.step_mw or stats.quantum(readings(raw.power, rail.name)[1])


def training_total_j(dense_step_mj: float, ticket_step_mj: float, training: Training) -> dict[str, Any]:
    """Joules of a whole training, dense against ticket: energy of a step times steps, search and probe included."""
    dense = dense_step_mj * training.dense_steps / 1e3
    ticket = (dense_step_mj * training.search_steps + ticket_step_mj * training.ticket_steps) / 1e3
    return {"dense": dense, "ticket": ticket, "ratio": ticket / dense, "reason": None}


def without(power: Power, reason: str) -> Power:
    """The same bench without power, and why."""
    return dataclasses.replace(power, source=None, reason=reason, rails=(), t_ns=(), values={})
