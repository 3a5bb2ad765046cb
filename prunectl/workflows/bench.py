"""`prunectl bench`: latency and energy of networks, a run's dense and pruned one say, measured side by side on one device.

Each network is exported for the device if it is not yet, the windows are interleaved, the raw samples are kept, and the
report is computed from them alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl.bench import devices as device_room
from prunectl.bench.onnxfile import opened
from prunectl.bench.records import Job, OnnxModel, RawBench, Settings, Training, TrainModel
from prunectl.bench.report import BenchReport, report, training_total
from prunectl.console import Console
from prunectl.errors import CorruptFile, UsageError
from prunectl.export.artifact import read_record
from prunectl.export.profiles import load as load_profile
from prunectl.pruning.cost import training_flops
from prunectl.recipe import read_back
from prunectl.rundir import RunDir, read_json
from prunectl.training import compactmodel
from prunectl.versions import versions
from prunectl.workflows import engine
from prunectl.workflows import export as exporting
from prunectl.workflows.bench_plan import Plan

PROFILE = {"cpu": "cpu", "cuda": "gpu"}  # of the files that a device is given
TRAIN_BATCH = 32  # of a network that belongs to no run


@dataclass(frozen=True)
class Request:
    """What to measure and how. batch None: what a file fixes, else 1. out: folder of the raw samples; None: in the run."""

    paths: tuple[Path, ...] = ()
    plan: Plan = field(default_factory=Plan)
    train: bool = False
    batch: int | None = None
    baseline: Path | None = None
    data_dir: Path | None = None
    out: Path | None = None


def bench(request: Request, ui: Console) -> dict[str, Any]:
    """Measures and reports; the raw samples are kept in bench/ of the first run, or beside the first file."""
    begin, plan = time.monotonic(), request.plan
    if plan.device == "replay":
        if request.paths:
            raise UsageError(f"--device replay reads one record and measures nothing; leave {request.paths[0]} out")
        raw = device_room.devices.get(plan.device)(Job(), plan.settings, target=plan.target, say=ui.detail)
        return _result(raw, Path(plan.target or ""), None, begin, ui)
    device_room.check_present(plan.device, plan.target, plan.settings)
    networks = _networks(request)
    names, folder = _names(networks), _folder(request, networks[0])
    exporting.check_folder(folder)
    settings, job = plan.settings, Job()
    if request.train:
        job = replace(job, train=_trainable(networks, names, settings))
    job = replace(job, models=_files(networks, names, request, ui))
    ui.say(_announcement(job, plan))
    with ui.working() as say:
        raw = device_room.devices.get(plan.device)(job, settings, target=plan.target, say=say)
    if request.train:
        training, reason = _training(networks, job.train)
        raw = replace(raw, training=training, training_reason=reason)
    kept = folder / f"raw-{plan.device}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    macs = {name: compactmodel.read(n).plan["macs"] for n, name in zip(networks, names, strict=True) if n.suffix != ".onnx"}
    return _result(raw, raw.write(kept), networks[0], begin, ui, macs)


def _networks(request: Request) -> list[Path]:
    """The networks and files that are measured, the baseline's first, each once."""
    paths = [*([request.baseline] if request.baseline else []), *(request.paths or [Path("runs/latest")])]
    return list(dict.fromkeys(network.resolve() for path in paths for network in _expanded(path)))


def _expanded(path: Path) -> list[Path]:
    """What `path` stands for: a run's dense and pruned networks, one saved network, or an ONNX file."""
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"{path} is not a file; expected an ONNX model or a run")
        return [path]
    several = [p.parent for part in ("dense", "compact", "model", "channels-*") for p in sorted(path.glob(f"{part}/{compactmodel.PLAN}"))]
    return several or [compactmodel.locate(path)]


def _names(networks: Sequence[Path]) -> list[str]:
    """The last part of each path without .onnx, or as many parts as it takes to tell them apart."""
    parts = [(path.with_suffix("") if path.suffix == ".onnx" else path).parts for path in networks]
    depths = range(1, 1 + max(map(len, parts)))
    short = (["/".join(p[-depth:]) for p in parts] for depth in depths)
    return next((names for names in short if len(set(names)) == len(names)), list(map(str, networks)))


def _files(networks: Sequence[Path], names: Sequence[str], request: Request, ui: Console) -> tuple[OnnxModel, ...]:
    plan = request.plan
    profile = plan.profile or PROFILE.get(plan.device)
    if profile is None and any(network.suffix != ".onnx" for network in networks):
        ui.detail("asking the board what it is")
        profile = engine.default_profile(engine.Board(plan.target), plan.settings.python)
    return tuple(
        opened(network, name, request.batch) if network.suffix == ".onnx" else _exported(network, name, str(profile), request, ui)
        for network, name in zip(networks, names, strict=True)
    )


def _exported(network: Path, name: str, profile: str, request: Request, ui: Console) -> OnnxModel:
    """The ONNX file of a saved network for the device, exported now unless it is there and whole."""
    chosen, asked = load_profile(profile), request.plan.settings.precision
    chosen.check_precision(asked)
    precision = chosen.graph_precision(asked)
    want = exporting.Request(path=network, profile=profile, precision=precision, batch=request.batch or 1, data_dir=request.data_dir)
    if request.out and not _is_of(network, exporting.target_of(want)) and not exporting.writable(exporting.target_of(want).parent):
        want = replace(want, out=request.out / name)  # a run that is read-only
    target = exporting.target_of(want)
    if not _is_of(network, target):
        exporting.export(want, ui)
    return OnnxModel(target, name, request.batch or 1, precision=precision, typed=chosen.fp16 == "graph")


def _is_of(network: Path, file: Path) -> bool:
    """The file is there, whole, and holds the weights of the network."""
    try:
        return bool(read_record(file).provenance.weights_sha256 == compactmodel.read(network).plan["weights_sha256"])
    except (UsageError, CorruptFile):
        return False


def _announcement(job: Job, plan: Plan) -> str:
    s, n = plan.settings, len(job.models)
    seconds = n * s.repeats * (s.warmup_s + s.duration_s) + s.idle_s + s.refresh_probe_s * (plan.device == "jetson")
    about = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} hours"
    more = " and the training steps" if job.train else ""
    engines = " and the engine builds" if plan.device == "jetson" else ""
    where = plan.device if plan.target is None else f"{plan.device} {plan.target}"
    return f"{n} model{'s' * (n > 1)} on {where}, {s.repeats} windows of {s.duration_s:g} s each, in turns: about {about}{engines}{more}"


def _run_of(network: Path) -> RunDir | None:
    """The run that a network, or a file exported from it, lies in."""
    return next((run for run in map(RunDir, network.parents[:2]) if run.recipe.is_file()), None)


def _trainable(networks: Sequence[Path], names: Sequence[str], settings: Settings) -> tuple[TrainModel, ...]:
    """The networks in training mode. All take one batch: the one that was asked for, else the first one's run's."""
    files = [network for network in networks if network.suffix == ".onnx"]
    if files:
        raise UsageError(f"--train needs runs or saved networks; {files[0]} is an ONNX file and cannot be trained")
    run = _run_of(networks[0])
    batch = settings.train_batch or (read_back(run.recipe).train.batch_size if run else TRAIN_BATCH)
    made = []
    for network, name in zip(networks, names, strict=True):
        saved = compactmodel.read(network)
        module = saved.module().train().requires_grad_(True)
        shape = (batch, *saved.input_shape)
        made.append(TrainModel(module, name, shape, saved.plan["model"]["num_classes"], settings.train_steps))
    return tuple(made)


def _training(networks: Sequence[Path], tasks: Sequence[TrainModel]) -> tuple[Training | None, str | None]:
    """How the run trained whose dense and pruned network were both measured; else why nothing is known."""
    by_path = dict(zip(networks, tasks, strict=True))
    pairs = [(run / "dense", run / "compact") for run in dict.fromkeys(n.parent for n in networks)]
    pair = next(((d, t) for d, t in pairs if d in by_path and t in by_path), None)
    if pair is None:
        return None, "needs the dense and the pruned network of one find-ticket run"
    run = RunDir(pair[0].parent)
    result = read_json(run.result) if run.finished else {}
    if result.get("verb") != "find-ticket" or result.get("outcome") != "found" or result["accuracy"]["final"] is None:
        return None, f"{run.path.name} did not train a ticket to the end of its schedule"
    if result["training_flops"]["ratio"] is None:
        return None, str(result["training_flops"].get("reason", f"{run.path.name} does not know what its training cost"))
    dense, ticket = by_path[pair[0]], by_path[pair[1]]
    drawn = result["found_epoch"] / read_back(run.recipe).train.epochs
    steps = _steps(result["training_flops"], result["macs"], drawn, dense.input_shape[0])
    return Training(run.path.name, dense.name, ticket.name, *steps), None


def _steps(flops: dict[str, int], macs: dict[str, int], drawn: float, batch: int) -> tuple[float, float, float]:
    """(dense_steps, search_steps, ticket_steps) of `Training`. drawn: the share of the schedule before the draw.

    What was spent beyond the training steps of both networks is forward passes of probe, repair and batch norm; they count as
    the dense steps that their FLOPs make."""
    dense, ticket = (training_flops(macs[name], batch) for name in ("dense", "ticket"))
    steps = flops["dense"] / dense
    looking = (flops["spent"] - drawn * steps * dense - (1 - drawn) * steps * ticket) / dense
    return steps, drawn * steps + looking, (1 - drawn) * steps


def _folder(request: Request, first: Path) -> Path:
    """Where the raw samples will be."""
    run = _run_of(first)
    return request.out or (run.path if run else first.parent if first.suffix == ".onnx" else first) / "bench"


def _result(
    raw: RawBench, kept: Path, network: Path | None, begin: float, ui: Console, macs: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """macs: of an image, by the networks' names, where they are known."""
    found = report(raw)
    for sentence in (*found.warnings, *_slower_though_smaller(found, macs or {})):
        ui.warn(sentence)
    run = _run_of(network) if network else None
    asked = read_back(run.recipe) if run else None
    fields = found.to_dict()
    return {
        "schema": 1,
        "verb": "bench",
        "run": str(run.path) if run else None,
        "outcome": "measured",
        "model": asked.model.name if asked else None,
        "dataset": asked.data.name if asked else None,
        "seed": asked.seed if asked else None,
        "device": raw.device,
        "simulated": found.simulated,
        "reports": fields["reports"],
        "ratios": fields["ratios"],
        "train_total_j": training_total(raw, found),
        "settings": dict(raw.settings),
        "raw": str(kept.resolve()),
        "wall_s": round(time.monotonic() - begin, 3),
        "versions": versions(),
        "warnings": list(ui.warnings),
    }


def _slower_though_smaller(found: BenchReport, macs: Mapping[str, int]) -> Iterator[str]:
    """What no user expects: fewer MACs, more time. Narrow or odd widths, or many small layers, can do that."""
    for r in found.ratios:
        fewer = {r.numerator, r.denominator} <= macs.keys() and macs[r.numerator] < macs[r.denominator]
        if r.metric == "latency_ms" and r.differs and r.median > 1 and fewer:
            share = macs[r.numerator] / macs[r.denominator]
            yield (
                f"{r.numerator} has {share:.2f} of the MACs of {r.denominator} and is slower here: MACs are no measure of time; "
                "try widths in multiples of 8 or 16 (find-ticket --round-to) or larger batches"
            )


def show(result: dict[str, Any], ui: Console) -> None:
    title = f"{result['device']}{', SIMULATED sensor or engine' if result['simulated'] else ''}"
    header = ["network", "p50 ms", "p90 ms", "p99 ms", "images/s", "mJ/image", "ms/step", "mJ/step"]
    shown = len(header) if any(r["train"] for r in result["reports"]) else len(header) - 2  # no column for what was not asked for
    ui.table(title, header[:shown], [row[:shown] for row in _rows(result["reports"])])
    for ratio in result["ratios"]:
        interval = f", 95 % interval {ratio['ci95'][0]:.3f} to {ratio['ci95'][1]:.3f}" if ratio["ci95"] else f" ({ratio['reason']})"
        claim = "" if ratio["differs"] or not ratio["ci95"] else ": no difference can be claimed"
        ui.say(f"{ratio['metric']}: {ratio['numerator']} takes {ratio['median']:.3f} of {ratio['denominator']}{interval}{claim}")
    total = result["train_total_j"]
    if total["ratio"] is not None:
        ui.say(
            f"whole training: {total['dense']:.4g} J dense, {total['ticket']:.4g} J with the ticket, search included: {total['ratio']:.3f}"
        )
    for reason in sorted({r["energy"]["reason"] for r in result["reports"] if r["energy"] and r["energy"]["reason"]}):
        ui.say(f"energy not measured: {reason}")
    ui.say(f"raw samples: {result['raw']}")


def _rows(reports: Sequence[dict[str, Any]]) -> list[list[object]]:
    """One row a network: what was inferred and what was trained under one name stand side by side."""
    rows: dict[str, dict[str, Any]] = {}
    for r in reports:
        latency, energy, train = r["latency_ms"] or {}, r["energy"] or {}, r["train"] or {}
        cells = {k: latency.get(k) for k in ("p50", "p90", "p99")} | {"per_s": r["throughput_per_s"], "mj": energy.get("mj_per_inference")}
        cells |= {"step_ms": train.get("ms_per_step"), "step_mj": train.get("mj_per_step")}
        row = rows.setdefault(r["artifact"], dict.fromkeys(cells))
        row.update({k: v for k, v in cells.items() if v is not None})
    return [[name, *(None if v is None else f"{v:.4g}" for v in cells.values())] for name, cells in rows.items()]
