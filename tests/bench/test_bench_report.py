"""What a report says of records made by hand: every number can be worked out on paper."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from prunectl.bench import energy
from prunectl.bench.records import Artifact, Power, Rail, RawBench, Telemetry, Training, Window
from prunectl.bench.report import BenchReport, report, training_total
from prunectl.bench.stats import NotMeasured
from prunectl.errors import PrunectlError

S = 1_000_000_000


def record(
    *,
    latency_ms: tuple[float, float] = (10.0, 5.0),
    busy_mw: tuple[float, float] = (6000.0, 5000.0),
    idle_mw: float = 2000.0,
    repeats: int = 5,
    seconds: float = 60.0,
    noise_mw: float = 20.0,
    batch: int = 1,
) -> RawBench:
    """Dense and pruned in turns, 60 s each; power steps between idle and busy, with a noise whose mean is zero over every window."""
    rng = np.random.default_rng(0)
    windows, t = [Window("idle", None, 0, S, 31 * S)], 35.0
    for repeat in range(repeats):
        for i, ms in enumerate(latency_ms):
            n = round(seconds * 1e3 / ms)
            windows.append(Window("load", i, repeat, int(t * S), int((t + seconds) * S), tuple([int(ms * 1e6)] * n)))
            t += seconds + 5
    stamps = np.arange(0, int((t + 1) * S), S // 20)
    power = np.full(stamps.shape, idle_mw)
    for w in windows[1:]:
        power[(stamps >= w.start_ns - S) & (stamps <= w.end_ns + S)] = busy_mw[w.artifact]
    flicker = rng.normal(0, noise_mw, stamps.size // 2 + 1)
    power = np.round(power + np.repeat(flicker, 2)[: stamps.size] - np.repeat(flicker, 2)[1 : stamps.size + 1])
    values = {"VDD_IN": tuple(power.tolist()), "VDD_SYS_GPU": tuple((power / 2).tolist())}
    rails = (Rail("VDD_IN", "mW"), Rail("VDD_SYS_GPU", "mW"))
    clock = Telemetry(tuple(range(0, int(t) * S, S)), {"gpu_hz": tuple([1.3e9] * int(t))})
    return RawBench(
        "jetson", False,
        tuple(Artifact(name, "engine", None, batch, "fp16") for name in ("dense", "pruned")),
        tuple(windows), Power("ina3221-iio", None, 50.0, rails, tuple(stamps.tolist()), values), clock,
    )  # fmt: skip


def with_power(raw: RawBench, **changes: object) -> RawBench:
    return dataclasses.replace(raw, power=dataclasses.replace(raw.power, **changes))


def test_joules_worked_out_on_paper():
    result = report(record())
    dense, pruned = result.reports
    assert (dense.n, dense.latency_ms["p50"], dense.throughput_per_s) == (30000, 10.0, pytest.approx(100.0))
    assert dense.energy.mj_per_inference == pytest.approx(6000 * 60 / 6000, rel=1e-3)  # 60 mJ: 6 W for 10 ms
    assert pruned.energy.mj_per_inference == pytest.approx(25.0, rel=1e-3)
    assert dense.energy.idle_subtracted_mj == pytest.approx(40.0, rel=1e-3)  # 4 W above idle for 10 ms
    assert pruned.energy.idle_subtracted_mj == pytest.approx(15.0, rel=1e-3)
    assert dense.energy.at_rate_per_s == pytest.approx(100.0)
    assert pruned.energy.at_rate_mj == pytest.approx(15.0 + 2000 / 100, rel=1e-3)  # its own, and 10 ms of idling
    assert dense.energy.per_rail_mj["VDD_SYS_GPU"] == pytest.approx(30.0, rel=1e-3)  # reported, not added
    assert dense.power_w == pytest.approx(6.0, rel=1e-3)
    assert result.warnings == () and not result.simulated


def test_ratios_and_claims():
    ratios = {r.metric: r for r in report(record()).ratios}
    assert ratios["latency_ms"].median == 0.5 and ratios["latency_ms"].differs
    assert ratios["mj_per_inference"].median == pytest.approx(25 / 60, rel=1e-3) and ratios["mj_per_inference"].differs
    same = {r.metric: r for r in report(record(latency_ms=(10.0, 10.0), busy_mw=(6000.0, 6000.0))).ratios}
    assert not same["mj_per_inference"].differs and same["mj_per_inference"].ci95[0] <= 1 <= same["mj_per_inference"].ci95[1]
    few = report(record(repeats=2)).ratios[0]
    assert few.ci95 is None and few.reason == "2 repeats: an interval needs 3" and not few.differs


def test_an_inference_is_one_image():
    single, batched = report(record()).reports[0], report(record(batch=8)).reports[0]
    assert batched.energy.mj_per_inference == pytest.approx(single.energy.mj_per_inference / 8)
    assert batched.throughput_per_s == pytest.approx(8 * single.throughput_per_s)
    assert batched.latency_ms == single.latency_ms  # of the whole batch


def test_no_sensor_is_null_with_its_reason():
    raw = dataclasses.replace(record(), power=energy.without(record().power, "no power sensor answers: looked everywhere"))
    result = report(raw)
    for found in result.reports:
        assert found.energy.mj_per_inference is None and found.energy.idle_subtracted_mj is None and found.power_w is None
        assert found.energy.reason == "no power sensor answers: looked everywhere"
        assert found.latency_ms["p50"] > 0
    assert [r.metric for r in result.ratios] == ["latency_ms"]
    assert "0.0" not in json.dumps(dataclasses.asdict(result.reports[0].energy))


def test_no_idle_window_leaves_only_the_headline():
    raw = record()
    found = report(dataclasses.replace(raw, windows=raw.windows[1:])).reports[0].energy
    assert found.mj_per_inference == pytest.approx(60, rel=1e-3)
    assert found.idle_subtracted_mj is None and found.at_rate_mj is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t, v: (t[:3000] + tuple(s - 100 * S for s in t[3000:]), v), "the clock of the samples jumped"),
        (lambda t, v: (t[:2000] + tuple(s + 40 * S for s in t[2000:]), v), "no sample for 40"),
        (lambda t, v: (t, v[:1800] + (v[1800],) * (len(v) - 1800)), "the sensor held one value for 60"),
        (lambda t, v: (t[:5000], v[:5000]), "do not reach over the whole window"),
        (lambda t, v: (t, v[:2000] + (None,) * (len(v) - 2000)), "do not reach over the whole window"),
    ],
)
def test_a_series_that_cannot_be_trusted_has_no_energy(spoil, reason):
    raw = record()
    t, v = spoil(raw.power.t_ns, raw.power.values["VDD_IN"])
    raw = with_power(raw, t_ns=t, values={"VDD_IN": v}, rails=raw.power.rails[:1])
    reasons = [r.energy.reason or "" for r in report(raw).reports]
    assert any(re.search(reason, text) for text in reasons)
    assert all(r.energy.mj_per_inference is None for r in report(raw).reports if r.energy.reason)


def test_a_rail_that_missed_some_readings_still_counts():
    raw = record()
    values = list(raw.power.values["VDD_IN"])
    values[::7] = [None] * len(values[::7])
    result = report(with_power(raw, values={**raw.power.values, "VDD_IN": tuple(values)}))
    assert result.reports[0].energy.mj_per_inference == pytest.approx(60, rel=1e-3)
    assert any("rail VDD_IN did not answer" in w for w in result.warnings)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["VDD_SYS_GPU", "VDD_IN", "VDD_SYS_CPU"], ["VDD_IN"]),
        (["POM_5V_CPU", "POM_5V_IN", "POM_5V_GPU"], ["POM_5V_IN"]),
        (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"], ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]),
        (["package-0", "core-0", "package-1"], ["package-0", "package-1"]),
    ],
)
def test_which_rails_are_the_whole_module(names, group):
    assert energy.headline([Rail(name, "mW") for name in names]) == group


def test_of_several_rails_one_may_rest():
    """An AGX Xavier whose CV engines are not used; a module that stands still as a whole is still no measurement."""
    raw = record()
    whole = raw.power.values["VDD_IN"]
    names = ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")
    values = {name: tuple([0.0] * len(whole)) for name in names}
    rails = tuple(Rail(name, "mW") for name in names)
    moving = with_power(raw, rails=rails, values={**values, "GPU": whole})
    assert report(moving).reports[0].energy.mj_per_inference == pytest.approx(60, rel=1e-3)
    assert "does not update" in report(with_power(raw, rails=rails, values=values)).reports[0].energy.reason


def test_the_slowest_models_rate_is_that_of_its_median_window():
    """One window of the fast network in which little was done says nothing of the slow one."""
    raw = record()
    disturbed = next(w for w in raw.windows if w.artifact == 1)
    windows = tuple(dataclasses.replace(w, latency_ns=w.latency_ns[::8]) if w is disturbed else w for w in raw.windows)
    assert report(dataclasses.replace(raw, windows=windows)).reports[0].energy.at_rate_per_s == pytest.approx(100.0)


def test_an_unknown_board_has_no_headline():
    with pytest.raises(NotMeasured, match="VDD_X, VDD_Y"):
        energy.headline([Rail("VDD_X", "mW"), Rail("VDD_Y", "mW")])


def test_a_counter_is_read_like_a_rail():
    """The GPU's energy counter, read at the edges of each window: 250 W."""
    raw = record()
    loads = raw.windows
    t = sorted({edge for w in loads for edge in (w.start_ns, w.end_ns)})
    power = Power("nvml", None, None, (Rail("gpu", "uJ"),), tuple(t), {"gpu": tuple(250e6 * s / S for s in t)})
    result = report(dataclasses.replace(raw, power=power))
    assert result.reports[0].energy.mj_per_inference == pytest.approx(2500.0)
    assert result.reports[0].power_w == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: dataclasses.replace(r, simulated=True, simulated_by=("sensors under /tmp/x",)), "simulated: sensors under /tmp/x"),
        (lambda r: record(seconds=10.0), "short windows"),
        (lambda r: with_power(r, skipped=({"name": "VDD_4V0_WIFI", "reason": "unplugged"},)), "rail VDD_4V0_WIFI was left out"),
        (
            lambda r: dataclasses.replace(r, windows=tuple(rising(w) for w in r.windows)),
            "dense: latency rose within 5 of its windows, by up to",
        ),
        (lambda r: dataclasses.replace(r, telemetry=throttled(r.telemetry)), "the GPU clock moved between 1000 and 1300 MHz"),
        (lambda r: dataclasses.replace(r, windows=stepped(r.windows)), "the wall clock was stepped by 7200.0 s"),
        (lambda r: record(busy_mw=(2030.0, 2030.0), noise_mw=0.4), "is coarse"),
        (lambda r: dataclasses.replace(r, train_reason="no torch there"), "training: no torch there"),
        (
            lambda r: dataclasses.replace(r, artifacts=(r.artifacts[0], dataclasses.replace(r.artifacts[1], batch=8))),
            "the batches are 1 and 8: compare images a second",
        ),
    ],
)
def test_warnings(change, words):
    assert any(words in warning for warning in report(change(record())).warnings)


def rising(window: Window) -> Window:
    n = len(window.latency_ns)
    return dataclasses.replace(window, latency_ns=tuple(int(ns * (1 + 0.1 * i / n)) for i, ns in enumerate(window.latency_ns)))


def throttled(clock: Telemetry) -> Telemetry:
    hz = [1.0e9 if i > 200 else 1.3e9 for i in range(len(clock.t_ns))]
    return dataclasses.replace(clock, values={"gpu_hz": tuple(hz)})


def stepped(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    return tuple(dataclasses.replace(w, wall_offset_s=1e9 + (7200.0 if i > 3 else 0.0)) for i, w in enumerate(windows))


def test_training_is_per_step():
    raw = record()
    artifacts = tuple(dataclasses.replace(a, kind="traced", batch=32) for a in raw.artifacts)
    raw = dataclasses.replace(
        raw, artifacts=artifacts, windows=tuple(dataclasses.replace(w, kind=w.kind.replace("load", "train")) for w in raw.windows)
    )
    result = report(raw)
    dense = result.reports[0].train
    assert (dense.ms_per_step, dense.mj_per_step) == (10.0, pytest.approx(60.0, rel=1e-3))  # a step, whatever its batch
    assert dense.steps == 30000 and result.reports[0].latency_ms is None
    assert {r.metric for r in result.ratios} == {"ms_per_step", "mj_per_step"}
    raw = dataclasses.replace(raw, training=Training("run", "dense", "pruned", dense_steps=1000, search_steps=100, ticket_steps=900))
    total = training_total(raw, result)
    assert total["dense"] == pytest.approx(60.0, rel=1e-3)
    assert total["ticket"] == pytest.approx(100 * 0.06 + 900 * 0.025, rel=1e-3)
    assert total["ratio"] == pytest.approx(total["ticket"] / total["dense"]) and total["reason"] is None
    unknown = training_total(dataclasses.replace(raw, training=None, training_reason="no run"), result)
    assert unknown == {"dense": None, "ticket": None, "ratio": None, "reason": "no run"}


def test_a_report_survives_json():
    result = report(record(repeats=3))
    assert BenchReport.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_raw_record_survives_json(tmp_path):
    raw = dataclasses.replace(record(repeats=1, seconds=5.0), training=Training("run", "dense", "pruned", 9.0, 2.0, 7.0))
    again = RawBench.read(raw.write(tmp_path / "raw.json"))
    assert again == raw
    assert report(again) == report(raw)


def leaves(value, path=()):
    """Paths of everything in a record, of long lists the first entries."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("bad", [None, -1, 10**30, float("nan"), "x", [], {"a": 1}], ids=repr)
def test_a_record_with_one_wrong_value_is_analysed_or_refused_in_a_sentence(bad):
    whole = json.loads(json.dumps(dataclasses.asdict(record(repeats=2, seconds=0.5))))
    tried = 0
    for path in leaves(whole):
        damaged = copy.deepcopy(whole)
        place = functools.reduce(lambda inner, key: inner[key], path[:-1], damaged)
        place[path[-1]] = bad
        with contextlib.suppress(PrunectlError):
            report(RawBench.from_dict(damaged))
        tried += 1
    assert tried > 70


def counted(raw: RawBench, uj: Callable[[int], float], *, every: int = 1) -> RawBench:
    """The record with a counter in the place of its power sensor, read at every `every`-th sample."""
    t = raw.power.t_ns[::every]
    return dataclasses.replace(
        raw, power=Power("rapl", None, 50.0, (Rail("package-0", "uJ", 2**40),), t, {"package-0": tuple(uj(x) for x in t)})
    )


def test_a_counter_gives_the_joules_that_it_counts():
    found = report(counted(record(), lambda t: 5e6 * t / S))  # 5 W
    assert [r.energy.mj_per_inference for r in found.reports] == pytest.approx([50, 25])


@pytest.mark.parametrize(
    ("uj", "every", "words"), [(lambda t: 5.0, 1, "did not move"), (lambda t: 5e6 * t / S, 400, "no sample for 20.00 s")]
)
def test_a_counter_that_cannot_be_trusted_has_no_energy_and_a_reason(uj, every, words):
    found = report(counted(record(), uj, every=every))
    assert all(r.energy.mj_per_inference is None and words in r.energy.reason for r in found.reports)
    assert all(r.latency_ms for r in found.reports) and [r.metric for r in found.ratios] == ["latency_ms"]


def test_short_training_windows_are_warned_of():
    """The joules of a whole training rest on them."""
    raw = record()
    watched = tuple(dataclasses.replace(w, kind="refresh", artifact=None) for w in raw.windows[1:2])
    step = Window("train", 2, 0, raw.windows[2].start_ns, raw.windows[2].start_ns + S // 10, tuple([10**6] * 100))
    module = Artifact("dense", "module", None, 8, "fp32")
    found = report(dataclasses.replace(raw, windows=(*raw.windows, *watched, step), artifacts=(*raw.artifacts, module)))
    assert any("train window of 0.1 s" in w and "train_steps" in w for w in found.warnings), found.warnings
