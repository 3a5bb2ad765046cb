"""What a bench says: a BenchReport, computed from a RawBench and from nothing else.

An inference is one image: a batch of 8 that draws 80 mJ costs 10 mJ an inference. latency_ms is of a whole batch. A number
that was not measured is None, with the reason beside it. A saving is claimed only where the interval of the ratio leaves 1 out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.bench import energy, stats
from prunectl.bench.records import Artifact, Rail, RawBench, Window
from prunectl.bench.stats import NotMeasured

ENOUGH_INFERENCES, ENOUGH_REFRESHES, ENOUGH_SECONDS = 1000, 100, 60.0
TRAINED = ("module", "traced")  # kinds of artifacts that optimizer steps were timed of
DRIFT = 0.02  # of latency over a window, of clocks between windows, of time lost to other programs


@dataclass(frozen=True)
class Energy:
    """Of one inference. at_rate: when they come at the rate of the slowest model compared. simulated: no real sensor or engine."""

    mj_per_inference: float | None
    ci95: tuple[float, float] | None
    idle_subtracted_mj: float | None
    at_rate_mj: float | None
    at_rate_per_s: float | None
    per_rail_mj: Mapping[str, float]
    quantum_mw: float | None
    refresh_ms: float | None
    source: str | None
    simulated: bool
    reason: str | None


@dataclass(frozen=True)
class Train:
    """Of one optimizer step. ci95 and ci95_mj: over the repeats. reason: why what is None is None."""

    ms_per_step: float | None
    ci95: tuple[float, float] | None
    mj_per_step: float | None
    ci95_mj: tuple[float, float] | None
    steps: int
    reason: str | None


@dataclass(frozen=True)
class ArtifactReport:
    artifact: str
    sha256: str | None
    device: str
    batch: int
    precision: str
    n: int
    latency_ms: Mapping[str, float] | None
    throughput_per_s: float | None
    energy: Energy | None
    train: Train | None
    power_w: float | None
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """numerator over denominator, repeat by repeat. differs: the interval leaves 1 out, so the difference may be claimed."""

    metric: str
    numerator: str
    denominator: str
    median: float
    ci95: tuple[float, float] | None
    differs: bool
    reason: str | None


@dataclass(frozen=True)
class BenchReport:
    reports: tuple[ArtifactReport, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]
    simulated: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BenchReport:
        def pair(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

        reports = []
        for report in record["reports"]:
            energy_, train = report["energy"], report["train"]
            parts = {"energy": energy_ and Energy(**pair(energy_)), "train": train and Train(**pair(train))}
            reports.append(ArtifactReport(**(dict(report) | parts)))
        ratios = tuple(Ratio(**pair(ratio)) for ratio in record["ratios"])
        return cls(tuple(reports), ratios, tuple(record["warnings"]), record["simulated"])


def report(raw: RawBench) -> BenchReport:
    """The BenchReport of a RawBench."""
    slowest = _slowest_rate(raw)
    trained = {a.name: i for i, a in enumerate(raw.artifacts) if a.kind in TRAINED}
    inferred = {a.name: i for i, a in enumerate(raw.artifacts) if a.kind not in TRAINED}
    reports = tuple(_artifact(raw, i, trained.get(name, i), slowest) for name, i in (trained | inferred).items())
    return BenchReport(reports, tuple(_ratios(raw)), tuple(_warnings(raw)), raw.simulated)


def training_total(raw: RawBench, found: BenchReport) -> dict[str, Any]:
    """Joules of the whole training of the run that was measured: {dense, ticket, ratio, reason}, null with the reason where unknown."""
    steps = {r.artifact: r.train for r in found.reports if r.train}
    reason = raw.training_reason or ("needs --train" if not steps else "the record names no run")
    if raw.training is not None and steps:
        dense, ticket = steps[raw.training.dense], steps[raw.training.ticket]
        if dense.mj_per_step is not None and ticket.mj_per_step is not None:
            return energy.training_total_j(dense.mj_per_step, ticket.mj_per_step, raw.training)
        reason = dense.reason or ticket.reason or "joules a step were not measured"
    return dict.fromkeys(("dense", "ticket", "ratio")) | {"reason": reason}


def windows_of(raw: RawBench, kind: str, artifact: int) -> list[Window]:
    """The artifact's windows of a kind, in the order of the repeats."""
    return sorted((w for w in raw.windows if w.kind == kind and w.artifact == artifact), key=lambda w: w.repeat)


def _throughput(window: Window, batch: int) -> float:
    return len(window.latency_ns) * batch / ((window.end_ns - window.start_ns) / 1e9)


def _energy_of_one_mj(raw: RawBench, window: Window, batch: int) -> float:
    return energy.window_energy_mj(raw, window) / (len(window.latency_ns) * batch)


def _slowest_rate(raw: RawBench) -> float | None:
    """Of the models' medians, as their throughput is: one disturbed window is not a model's rate."""
    models = [(windows_of(raw, "load", i), artifact.batch) for i, artifact in enumerate(raw.artifacts)]
    return min((float(np.median([_throughput(w, batch) for w in windows])) for windows, batch in models if windows), default=None)


def _or_none(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except NotMeasured:
        return None


def _artifact(raw: RawBench, index: int, trained: int, slowest: float | None) -> ArtifactReport:
    """Of the artifact `index`; trained: under which number the same network took optimizer steps."""
    artifact, windows = raw.artifacts[index], windows_of(raw, "load", index)
    latencies = np.concatenate([w.latency_ns for w in windows]) / 1e6 if windows else np.zeros(0)
    power = _or_none(lambda: float(np.median([energy.mean_power_mw(raw, w) for w in windows])) / 1e3) if windows else None
    return ArtifactReport(
        artifact=artifact.name,
        sha256=artifact.sha256,
        device=raw.device,
        batch=artifact.batch,
        precision=artifact.precision,
        n=latencies.size,
        latency_ms=stats.percentiles(latencies) if windows else None,
        throughput_per_s=float(np.median([_throughput(w, artifact.batch) for w in windows])) if windows else None,
        energy=_energy(raw, artifact, windows, slowest) if windows else None,
        train=_train(raw, raw.artifacts[trained], windows_of(raw, "train", trained)),
        power_w=power,
        environment=raw.environment,
    )


def _energy(raw: RawBench, artifact: Artifact, windows: Sequence[Window], slowest: float | None) -> Energy:
    try:
        each = [_energy_of_one_mj(raw, w, artifact.batch) for w in windows]
    except NotMeasured as why:
        return Energy(None, None, None, None, None, {}, None, None, raw.power.source, raw.simulated, str(why))
    idle = _or_none(lambda: energy.idle_mw(raw))
    dynamic = None
    if idle is not None:
        own = [e - idle / _throughput(w, artifact.batch) for e, w in zip(each, windows, strict=True)]
        dynamic = float(np.median(own))
    per_rail = {rail.name: _rail_mj(raw, rail, artifact, windows) for rail in raw.power.rails}
    at_rate = None if dynamic is None or idle is None or slowest is None else stats.at_fixed_rate_mj(dynamic, idle, slowest)
    return Energy(
        mj_per_inference=float(np.median(each)),
        ci95=_or_none(lambda: stats.confidence_95(each)),
        idle_subtracted_mj=dynamic,
        at_rate_mj=at_rate,
        at_rate_per_s=slowest,
        per_rail_mj={name: mj for name, mj in per_rail.items() if mj is not None},
        quantum_mw=_or_none(lambda: energy.quantum_mw(raw)),
        refresh_ms=_or_none(lambda: energy.refresh_ms(raw)),
        source=raw.power.source,
        simulated=raw.simulated,
        reason=None,
    )


def _rail_mj(raw: RawBench, rail: Rail, artifact: Artifact, windows: Sequence[Window]) -> float | None:
    """Energy of one inference on one rail; None where the rail cannot be trusted."""
    try:
        return float(np.median([energy.rail_energy_mj(raw.power, rail, w) / (len(w.latency_ns) * artifact.batch) for w in windows]))
    except NotMeasured:
        return None


def _train(raw: RawBench, artifact: Artifact, windows: Sequence[Window]) -> Train | None:
    """None for an artifact that was not to be trained."""
    if not windows:
        return Train(None, None, None, None, 0, raw.train_reason) if artifact.kind in TRAINED else None
    ms = [float(np.median(w.latency_ns)) / 1e6 for w in windows]
    try:
        mj, reason = [_energy_of_one_mj(raw, w, 1) for w in windows], None
    except NotMeasured as why:
        mj, reason = None, str(why)
    return Train(
        ms_per_step=float(np.median(ms)),
        ci95=_or_none(lambda: stats.confidence_95(ms)),
        mj_per_step=float(np.median(mj)) if mj else None,
        ci95_mj=_or_none(lambda: stats.confidence_95(mj)) if mj else None,
        steps=sum(len(w.latency_ns) for w in windows),
        reason=reason or raw.train_reason,
    )


def _ratios(raw: RawBench) -> list[Ratio]:
    """Each artifact against the first of its sort: latency and energy of an inference, time and energy of a step."""
    found = []
    for kind, metrics in (("load", ("latency_ms", "mj_per_inference")), ("train", ("ms_per_step", "mj_per_step"))):
        members = [i for i in range(len(raw.artifacts)) if windows_of(raw, kind, i)]
        for other in members[1:]:
            for metric, value in zip(metrics, (_median_ms, _energy_of_one_mj), strict=True):
                try:
                    found.append(_ratio(raw, kind, metric, value, other, members[0]))
                except NotMeasured:
                    continue  # the artifact's own report says why
    return found


def _median_ms(raw: RawBench, window: Window, batch: int) -> float:
    return float(np.median(window.latency_ns)) / 1e6


def _ratio(raw: RawBench, kind: str, metric: str, value: Callable[[RawBench, Window, int], float], other: int, base: int) -> Ratio:
    def series(index: int) -> list[float]:
        batch = raw.artifacts[index].batch if kind == "load" else 1
        return [value(raw, window, batch) for window in windows_of(raw, kind, index)]

    top, bottom = series(other), series(base)
    n = min(len(top), len(bottom))
    ratios = stats.paired_ratios(top[:n], bottom[:n])
    try:
        ci, reason = stats.confidence_95(ratios), None
    except NotMeasured as why:
        ci, reason = None, str(why)
    names = raw.artifacts[other].name, raw.artifacts[base].name
    return Ratio(metric, *names, float(np.median(ratios)), ci, bool(ci and not ci[0] <= 1.0 <= ci[1]), reason)


def _warnings(raw: RawBench) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = [f"simulated: {', '.join(raw.simulated_by)}; these are not measurements of a device"] if raw.simulated else []
    loads = [w for w in raw.windows if w.kind == "load" and w.artifact is not None]
    short = [w for w in loads if len(w.latency_ns) < ENOUGH_INFERENCES or (w.end_ns - w.start_ns) / 1e9 < ENOUGH_SECONDS - 1]
    if short and raw.power.source:
        w = min(short, key=lambda w: len(w.latency_ns))
        seconds = (w.end_ns - w.start_ns) / 1e9
        found.append(
            f"short windows ({seconds:.1f} s, {len(w.latency_ns)} inferences): an energy to publish needs 60 s and 1000 inferences"
        )
    counted = {a.name: sum(len(w.latency_ns) for w in loads if w.artifact == i) for i, a in enumerate(raw.artifacts)}
    few = {name: n for name, n in counted.items() if 0 < n < 100}
    if few:
        counts = ", ".join(f"{name} {n}" for name, n in few.items())
        found.append(f"p99 is of fewer than 100 inferences ({counts}): it is little more than the largest; raise --duration or --repeats")
    batches = sorted({raw.artifacts[w.artifact].batch for w in loads if w.artifact is not None})
    if len(batches) > 1:
        found.append(f"latency is of a whole batch, and the batches are {' and '.join(map(str, batches))}: compare images a second")
    found += _sensor_warnings(raw, loads, [w for w in raw.windows if w.kind == "train"])
    for index, artifact in enumerate(raw.artifacts):
        name = f"training {artifact.name}" if artifact.kind in TRAINED else artifact.name
        busy = [*windows_of(raw, "load", index), *windows_of(raw, "train", index)]
        rises = [change for w in busy if (change := stats.drift(w.latency_ns)) > DRIFT]
        if rises:
            text = f"latency rose within {len(rises)} of its windows, by up to {max(rises):.1%}"
            found.append(f"{name}: {text}: heat, a governor, or other programs; fix the clocks, cool, wait for quiet")
        waited = [w.details.get("waited_share", 0.0) for w in raw.windows if w.artifact == index]
        if max(waited, default=0.0) > DRIFT:
            found.append(f"{name}: other programs had its core for up to {max(waited):.0%} of a window: end them and measure again")
    found += _clock_warnings(raw, loads)
    offsets = [w.wall_offset_s for w in raw.windows if w.wall_offset_s is not None]
    if offsets and max(offsets) - min(offsets) > 0.5:
        found.append(
            f"the wall clock was stepped by {max(offsets) - min(offsets):.1f} s during the bench; stamps are monotonic, so nothing moved"
        )
    return found + ([f"training: {raw.train_reason}"] if raw.train_reason else [])


def _sensor_warnings(raw: RawBench, loads: Sequence[Window], trains: Sequence[Window]) -> list[str]:
    found = []
    refresh = _or_none(lambda: energy.refresh_ms(raw))
    for windows, more in ((loads, "--duration"), (trains, "--set bench.train_steps")):
        shortest_s = min(((w.end_ns - w.start_ns) / 1e9 for w in windows), default=None)
        if refresh and shortest_s and shortest_s < ENOUGH_REFRESHES * refresh / 1e3:
            found.append(
                f"the sensor has a new number every {refresh:.0f} ms: a {windows[0].kind} window of {shortest_s:.1f} s holds fewer than "
                f"{ENOUGH_REFRESHES}; raise {more}"
            )
    step, idle = _or_none(lambda: energy.quantum_mw(raw)), _or_none(lambda: energy.idle_mw(raw))
    busy = _or_none(lambda: float(np.median([energy.mean_power_mw(raw, w) for w in loads]))) if loads else None
    if step and idle is not None and busy is not None and step > DRIFT * abs(busy - idle):
        found.append(f"the sensor's step of {step:.0f} mW is coarse for {busy - idle:.0f} mW above idle: idle-subtracted numbers are rough")
    missing = {name: sum(v is None for v in values) for name, values in raw.power.values.items()}
    return found + [f"rail {name} did not answer {n} times" for name, n in missing.items() if n] + [
        f"rail {rail['name']} was left out: {rail['reason']}" for rail in raw.power.skipped
    ]  # fmt: skip


def _clock_warnings(raw: RawBench, loads: Sequence[Window]) -> list[str]:
    """The GPU's clock in the load windows: a change between them, or within one, is throttling or a governor at work."""
    clock = raw.telemetry.values.get("gpu_hz")
    if clock is None or not loads:
        return []
    t = np.asarray(raw.telemetry.t_ns)
    inside = np.zeros(t.shape, dtype=bool)
    for w in loads:
        inside |= (t >= w.start_ns) & (t <= w.end_ns)
    seen = [hz for hz, keep in zip(clock, inside, strict=True) if keep and hz]
    if seen and min(seen) < (1 - DRIFT) * max(seen):
        low, high = min(seen) / 1e6, max(seen) / 1e6
        return [f"the GPU clock moved between {low:.0f} and {high:.0f} MHz under load: fix it (jetson_clocks) or cool the board"]
    return []
