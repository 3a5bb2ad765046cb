"""`prunectl bench`: latency and energy of a run's dense and pruned network, measured side by side on one device.

Each network is exported for the device if it is not yet, the windows are interleaved, the raw samples are kept, and the
report is computed from them alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.bench import devices as device_room
from prunectl.bench.energy import training_total_j, training_total_unknown
from prunectl.bench.records import Job, OnnxModel, RawBench, Settings, TrainModel
from prunectl.bench.report import BenchReport, report
from prunectl.console import Console
from prunectl.errors import CorruptFile, UsageError
from prunectl.export.artifact import read_record
from prunectl.rundir import RunDir, read_json
from prunectl.training import compactmodel
from prunectl.workflows import export as exporting
from prunectl.workflows.session import versions

PROFILE = {"cpu": "cpu", "cuda": "gpu", "jetson": "tx2"}  # of the files that a device is given
TRAIN_BATCH = 32


@dataclass(frozen=True)
class Request:
    """What to measure, where and how long; None leaves the device's own default."""

    paths: tuple[Path, ...] = ()
    device: str = "cpu"
    host: str | None = None
    train: bool = False
    batch: int = 1
    warmup_s: float | None = None
    duration_s: float | None = None
    repeats: int | None = None
    quick: bool = False
    baseline: Path | None = None
    threads: int | None = None
    data_dir: Path | None = None


def bench(request: Request, ui: Console) -> dict[str, Any]:
    """Measures and reports; raw samples are kept beside the first run, or in bench/ of the working folder."""
    name, target = device_room.parse(request.device)
    settings = _settings(name, request)
    if name == "replay":
        raw = device_room.devices.get(name)(Job(), settings, target=target, say=ui.detail)
        return _result(raw, report(raw), Path(target or ""), None, ui)
    paths = _in_order(request)
    networks = [network for path in paths for network in _networks(path)]
    job = Job(
        models=tuple(_file(network, name, request, ui) for network in networks),
        train=tuple(_trainable(network) for network in networks) if request.train else (),
    )
    ui.say(f"{len(job.models)} models on {request.device}, {settings.repeats} interleaved repeats of {settings.duration_s:g} s each")
    raw = device_room.devices.get(name)(job, settings, target=request.host or target, say=ui.detail)
    kept = raw.write(_raw_path(paths[0], name))
    return _result(raw, report(raw), kept, _run_result(paths[0]) if request.train else None, ui)


def _settings(device: str, request: Request) -> Settings:
    given = (("warmup_s", request.warmup_s), ("duration_s", request.duration_s), ("repeats", request.repeats), ("threads", request.threads))
    changes: dict[str, Any] = {k: v for k, v in given if v is not None}
    settings = Settings(**changes) if device == "jetson" else Settings.for_host(**changes)
    return settings.quick() if request.quick else settings


def _in_order(request: Request) -> list[Path]:
    """What is measured, the baseline first."""
    paths = list(request.paths) or [Path("runs/latest")]
    return [request.baseline, *(p for p in paths if p != request.baseline)] if request.baseline else paths


def _networks(path: Path) -> list[Path]:
    """The networks that `path` stands for: a run's dense and pruned one, one saved network, or an ONNX file."""
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"{path} is not a file; expected an ONNX model or a run")
        return [path]
    both = [path / part for part in ("dense", "compact") if (path / part / compactmodel.PLAN).is_file()]
    return both or [compactmodel.locate(path)]


def _file(network: Path, device: str, request: Request, ui: Console) -> OnnxModel:
    """The ONNX file of a network for the device, exported now unless it is there and whole."""
    if network.suffix == ".onnx":
        return OnnxModel(network, network.stem, request.batch)
    want = exporting.Request(path=network, profile=PROFILE[device], batch=request.batch, data_dir=request.data_dir)
    target = exporting.target_of(want)
    try:
        fresh = read_record(target).provenance.weights_sha256 == compactmodel.read(network).plan["weights_sha256"]
    except (UsageError, CorruptFile):
        fresh = False
    if not fresh:
        exporting.export(want, ui)
    return OnnxModel(target, network.resolve().name, request.batch)


def _trainable(network: Path) -> TrainModel:
    if network.suffix == ".onnx":
        raise UsageError(f"--train needs a run or a saved network; {network} is an ONNX file and cannot be trained")
    saved = compactmodel.read(network)
    module = saved.module().train().requires_grad_(True)
    return TrainModel(module, network.resolve().name, (TRAIN_BATCH, *saved.input_shape), saved.plan["model"]["num_classes"])


def _raw_path(path: Path, device: str) -> Path:
    """raw.json in the run that was measured."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    run = folder if RunDir(folder).recipe.is_file() else folder.parent if RunDir(folder.parent).recipe.is_file() else folder
    (run / "bench").mkdir(parents=True, exist_ok=True)
    return run / "bench" / f"raw-{device}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def _run_result(path: Path) -> dict[str, Any] | None:
    run = RunDir(path)
    return read_json(run.result) if run.finished else None


def _training_total(found: BenchReport, result: dict[str, Any] | None) -> dict[str, Any]:
    """Joules of the whole training, dense against ticket, from joules a step; null with the reason where unknown."""
    steps = [r.train for r in found.reports if r.train]
    if result is None or result.get("verb") != "find-ticket" or result.get("outcome") != "found":
        return training_total_unknown("needs --train and a finished find-ticket run")
    if len(steps) != 2 or steps[0].mj_per_step is None or steps[1].mj_per_step is None:
        return training_total_unknown((steps[0].reason if steps else None) or "joules a step were not measured")
    flops, macs = result["training_flops"], result["macs"]
    dense_step = flops["dense"] / macs["dense"]
    share = macs["ticket"] / macs["dense"]
    searched = (flops["spent"] / flops["dense"] - share) / (1 - share)  # share of the schedule spent dense, probe included
    return training_total_j(
        steps[0].mj_per_step,
        steps[1].mj_per_step,
        dense_steps=dense_step / (6 * TRAIN_BATCH),
        search_steps=searched * dense_step / (6 * TRAIN_BATCH),
        ticket_steps=(1 - searched) * dense_step / (6 * TRAIN_BATCH),
    )


def _result(raw: RawBench, found: BenchReport, kept: Path, run_result: dict[str, Any] | None, ui: Console) -> dict[str, Any]:
    for sentence in found.warnings:
        ui.warn(sentence)
    fields = found.to_dict()
    return {
        "schema": 1,
        "verb": "bench",
        "outcome": "measured",
        "device": raw.device,
        "simulated": found.simulated,
        "reports": fields["reports"],
        "ratios": fields["ratios"],
        "train_total_j": _training_total(found, run_result),
        "raw": str(kept.resolve()),
        "versions": versions(),
        "warnings": list(ui.warnings),
    }


def show(result: dict[str, Any], ui: Console) -> None:
    rows: list[Sequence[object]] = []
    for r in result["reports"]:
        latency, energy, train = r["latency_ms"] or {}, r["energy"] or {}, r["train"] or {}
        cells = [latency.get(k) for k in ("p50", "p90", "p99")]
        rows.append(
            [
                r["artifact"],
                *(None if c is None else f"{c:.3f}" for c in cells),
                None if r["throughput_per_s"] is None else f"{r['throughput_per_s']:.0f}",
                _number(energy.get("mj_per_inference")),
                _number(train.get("ms_per_step")),
                _number(train.get("mj_per_step")),
            ]
        )
    title = f"{result['device']}{', SIMULATED sensor or engine' if result['simulated'] else ''}"
    ui.table(title, ["network", "p50 ms", "p90 ms", "p99 ms", "images/s", "mJ/image", "ms/train step", "mJ/train step"], rows)
    for ratio in result["ratios"]:
        interval = f", 95 % interval {ratio['ci95'][0]:.3f} to {ratio['ci95'][1]:.3f}" if ratio["ci95"] else f" ({ratio['reason']})"
        claim = "" if ratio["differs"] or not ratio["ci95"] else ": no difference can be claimed"
        ui.say(f"{ratio['metric']}: {ratio['numerator']} takes {ratio['median']:.3f} of {ratio['denominator']}{interval}{claim}")
    reasons = {str(e["reason"]) for e in (r["energy"] for r in result["reports"]) if e and e["reason"]}
    for reason in sorted(reasons):
        ui.say(f"energy not measured: {reason}")
    ui.say(f"raw samples: {result['raw']}")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
