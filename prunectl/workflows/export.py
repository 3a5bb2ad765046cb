"""`prunectl export`: a saved network as an ONNX file, and an engine, proven to be the network.

Build the graph for one profile, count its work again, compare its answers with torch's on real and random images, write
it, then measure the written FILE on the test split. Whatever fails leaves no file behind that looks finished."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from torch import Tensor, nn

from prunectl.console import Console
from prunectl.data import Dataset
from prunectl.errors import CorruptFile, DataMissing, UsageError, VerificationFailed
from prunectl.export import graph, lint, onnx, quantize, sparsity, verify
from prunectl.export.artifact import Artifact, InputSpec, Provenance, drafted, read_record, record_path, write_record
from prunectl.export.profiles import Profile
from prunectl.export.profiles import load as load_profile
from prunectl.export.session import load_onnx_session, pixels_of
from prunectl.training import compactmodel
from prunectl.versions import versions
from prunectl.workflows import engine
from prunectl.workflows.export_source import Pattern, Source, home, parse_sparsity

COMPARED = 256  # real images that torch and the graph both answer
NOISE = 8  # random ones
CALIBRATION = 512  # training images that set INT8's ranges
BATCH = 250
PRECISION_SLACK = 1.0  # points of accuracy that a lower precision may cost before it is spoken of
IN_THE_RECORD_ONLY = ("schema", "file", "kernel_params", "input", "engine_flags", "provenance")
FEW = 8  # images whose every activation is looked at
RUN_SLACK = 2.0  # points: a run may have been measured in bfloat16, which decides close calls otherwise; no file is further off


@dataclass(frozen=True)
class Request:
    """What to export and how. batch None: a free batch. sparsity: a share, or N:M, to which the network is pruned once, now."""

    path: Path
    profile: str | None = None
    trt: bool = False
    precision: str = "fp32"
    batch: int | None = 1
    uint8_input: bool = False
    host: str | None = None
    sparsity: str | None = None
    out: Path | None = None
    data_dir: Path | None = None


def export(request: Request, ui: Console) -> dict[str, Any]:
    """Writes, proves and measures; the result says what exists and what could not be built here.

    outcome: `exported`, or `bundled` when an engine was asked for and nothing here can build one (exit 5)."""
    started = time.perf_counter()
    source = Source.at(request.path, request.data_dir)
    profile, place = _profile(request)
    zeros_asked = parse_sparsity(request.sparsity) if request.sparsity else None
    pattern = zeros_asked if isinstance(zeros_asked, tuple) else None
    _check(request, profile, pattern)
    request = replace(request, profile=profile.name)
    target, plan = target_of(request), source.saved.plan
    check_folder(target.parent)
    _check_free(target, plan["parent"])
    spec = InputSpec.from_data(plan["data"])
    images = _images(source, request, ui)
    module = source.network(zeros_asked, images)
    if request.precision == "int8" and images is not None:
        source.require_same(images)

    ui.say(f"writing {target.name}: opset {profile.opset}, for {profile.reader}")
    fp32 = onnx.build(module, spec, profile, batch=request.batch)
    if less := verify.require_cost(verify.recount(module, fp32, spec)):
        ui.warn(f"{less}: what is constant or zero was worked out before the file was written, or is not counted")
    spec = spec.of_pixels() if request.uint8_input else spec
    model = onnx.lowered(fp32, spec, profile, request.precision, _calibration(images, request, ui))
    if request.precision == "fp16":
        _check_range(fp32, images, spec, profile, ui)
    measured = _proof(module, model, spec, images, profile.graph_precision(request.precision), profile, ui)
    zeros = sparsity.measure(model, n=pattern[0], m=pattern[1]) if pattern else sparsity.measure(model)
    if pattern:
        sparsity.require_pattern(zeros)
    pruning = {"steps": len(plan["steps"]), "params": plan["params"]}
    if zeros_asked:
        pruning |= {"sparsity": request.sparsity, "nonzero": zeros.nonzero, "weights": zeros.total}
    provenance = Provenance(plan["parent"], pruning, plan["weights_sha256"])
    with drafted(target) as draft:
        record = onnx.save(model, draft, spec=spec, profile=profile, precision=request.precision, provenance=provenance, measured=measured)
        if images is not None:
            record = _measured_file(draft, record, images, ui)
            full = record.accuracy
            if request.precision == "int8":
                full = _report_int8(onnx.lowered(fp32, spec, profile, "fp32"), model, record, images, ui)
            if zeros_asked is None:
                _require_accuracy(draft, full, source.test_accuracy())

    computes = profile.graph_precision(request.precision)
    artifacts, note = [_entry(target, record) | {"graph_precision": computes}], None
    if images is not None and computes != request.precision:
        half = onnx.lowered(fp32, spec, replace(profile, fp16="graph"), request.precision) if quantize.can_halve() else None
        artifacts[0] |= _estimated(half, record, request.precision, images, ui)
    if place is not None:
        built, note = engine.build(place, target, record, profile, sparse=pattern is not None, ui=ui)
        artifacts.append({**artifacts[0], **built})
    return {
        "schema": 1,
        "verb": "export",
        "run": str(home(source.saved.path)),
        "outcome": "bundled" if isinstance(place, engine.Nowhere) else "exported",
        "model": plan["model"]["name"],
        "dataset": plan["data"]["name"],
        "seed": source.recipe.seed if source.recipe else None,
        "profile": profile.name,
        "artifacts": artifacts,
        "lint": [asdict(f) for f in lint.lint(target, profile)],
        "zeros": zeros.statement if zeros_asked else None,
        "note": note,
        "wall_s": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "warnings": list(ui.warnings),
    }


def lint_only(path: Path, profile: str | None, ui: Console) -> dict[str, Any]:
    """What a profile's reader holds against any ONNX file. outcome: `clean`, or `refused` if one finding is an error (exit 4)."""
    chosen = load_profile(profile or "cpu")
    findings = lint.lint(path, chosen)
    rows = [[f.severity, f.node, f.operator, f.message, f.remedy] for f in findings]
    if rows:
        ui.table(f"{path.name} for {chosen.reader}", ["", "node", "operator", "finding", "remedy"], rows)
    else:
        ui.say(f"{path}: nothing known against it for {chosen.reader}")
    if errors := sum(f.severity == "error" for f in findings):
        ui.error(f"{path}: {errors} finding{'s' if errors > 1 else ''} that {chosen.reader} refuses or mis-reads")
    result = {"schema": 1, "verb": "export", "outcome": "refused" if errors else "clean", "profile": chosen.name, "artifacts": []}
    return {**result, "lint": [asdict(f) for f in findings], "warnings": list(ui.warnings)}


def target_of(request: Request) -> Path:
    """Where the file of a request with a profile goes: export/ of its run, named after network, profile and precision."""
    network = compactmodel.locate(request.path)
    parts = [network.resolve().name]
    if request.sparsity:
        zeros = parse_sparsity(request.sparsity)
        parts.append(f"s{zeros}" if isinstance(zeros, float) else "s{}of{}".format(*zeros))
    if request.uint8_input:
        parts.append("uint8")
    if request.batch != 1:
        parts.append(f"b{request.batch}" if request.batch else "dynamic")
    return (request.out or home(network) / "export") / f"{'-'.join(parts)}-{request.profile}-{request.precision}.onnx"


def _profile(request: Request) -> tuple[Profile, engine.Place | None]:
    """The profile that was named or fits what is there, and where its engine is built; None where none was asked for."""
    profile = load_profile(request.profile) if request.profile else None
    if not (request.trt or request.host or (profile and profile.ahead_of_time)):
        return profile or load_profile("cpu"), None
    place = engine.place(profile, request.host)
    return profile or load_profile(engine.default_profile(place)), place


def _check(request: Request, profile: Profile, pattern: Pattern | None) -> None:
    """Raises UsageError for what the profile does not take, before any work is done."""
    profile.check_precision(request.precision)
    profile.check_batch(request.batch)
    if pattern:
        profile.check_sparsity("{}:{}".format(*pattern))
    if request.uint8_input and profile.types is not None and "UINT8" not in profile.types:
        raise UsageError(f"--uint8-input with profile {profile.name}: {profile.reader} has no UINT8 tensors; normalise on the host")


def check_folder(folder: Path) -> None:
    """Raises UsageError if it is no folder that can be written to, and none can be made there; makes none yet."""
    if not writable(folder):
        raise UsageError(f"{folder} cannot be written to: {_obstacle(folder)}; choose another --out")


def _obstacle(folder: Path) -> str:
    try:
        there = _existing(folder)
    except OSError as e:
        return e.strerror or str(e)
    return f"{there} is {'not writable' if there.is_dir() else 'a file'}"


def _check_free(target: Path, run: str) -> None:
    """Raises UsageError if the file there is of another run: of its own it is replaced."""
    try:
        there = read_record(target).provenance.run
    except (UsageError, CorruptFile):  # nothing there, or nothing whole
        return
    if there != run:
        raise UsageError(f"{target} is of another run, {there}, and would be replaced: choose another --out")


def writable(folder: Path) -> bool:
    """It is a folder that takes files, or can be made."""
    try:
        there = _existing(folder)
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _images(source: Source, request: Request, ui: Console) -> Dataset | None:
    """The network's own data set; None, with a warning, where it is not at hand. INT8 cannot do without."""
    try:
        return source.dataset()
    except DataMissing as e:
        if request.precision == "int8":
            raise
        ui.warn(f"the file was compared on random images only and its accuracy not measured: {e}")
        return None


def _calibration(images: Dataset | None, request: Request, ui: Console) -> Iterator[Tensor]:
    if request.precision == "int8" and images is not None:
        chosen, _ = images.sample(max(CALIBRATION, request.batch or 0), seed=0, split="train")
        if len(chosen) < (request.batch or 0):
            raise UsageError(f"--batch {request.batch}: INT8 is calibrated on the {len(chosen)} training images; take a smaller batch")
        ui.say(f"calibrating INT8 on {len(chosen)} training images")
        yield from chosen.split(BATCH)


def _proof(
    module: nn.Module, model: ModelProto, spec: InputSpec, images: Dataset | None, precision: str, profile: Profile, ui: Console
) -> dict[str, float]:
    """max_abs_diff and top1_agreement of the graph against torch. Raises VerificationFailed when they differ too far."""
    session = verify.classifier(model, spec)
    random = verify.compare(module, session, verify.random_batches(spec, n=NOISE), images="random")
    verify.require_same(random, precision)
    real = random
    if images is not None:
        real = verify.compare(module, session, [images.sample(COMPARED, seed=0, split="val")])
        verify.require_same(real, precision)
    seen = f"{real.n} {real.images} and " if images is not None else ""
    ui.say(
        f"{profile.name}, {precision}: the graph answers as torch does on {seen}{random.n} random images "
        f"(largest difference {real.max_abs:.2g}, {real.max_rel:.1g} of the largest logit; top-1 agreement {real.top1_agreement:.1f} %)"
    )
    return {"max_abs_diff": max(real.max_abs, random.max_abs), "top1_agreement": real.top1_agreement}


def _check_range(fp32: ModelProto, images: Dataset | None, spec: InputSpec, profile: Profile, ui: Console) -> None:
    """Raises VerificationFailed for a value that FP16 cannot hold, in a graph that computes in it; warns where the engine build decides.

    ONNX Runtime on a CPU works FP16 graphs out in FP32, so that no comparison of answers shows it."""
    few = images.sample(FEW, seed=0, split="val")[0].numpy() if images is not None else verify.random_batches(spec, n=FEW)[0]
    if found := quantize.beyond_fp16(fp32, few):
        name, largest = found[0]
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        sentence = f"{name} reaches {largest:,.0f} on {len(few)} images, and FP16 ends at 65,504{more}"
        if profile.fp16 == "graph":
            raise VerificationFailed(f"{sentence}: export in fp32, or train with smaller activations (weight decay, batch norm)")
        ui.warn(f"{sentence}: the engine may answer nothing but NaN in FP16; build it in fp32")


def _measured_file(path: Path, record: Artifact, images: Dataset, ui: Console) -> Artifact:
    """The record with the accuracy of the file as it was written, on the test split."""
    found = verify.accuracy(load_onnx_session(path), _test_split(images, f"accuracy of {path.name}", ui))
    ui.say(f"{path.name}: {found.top1:.2f} % of {found.n} test images, {record.bytes:,} bytes")
    record = replace(record, accuracy=found.top1)
    write_record(path, record)
    return record


def _test_split(images: Dataset, label: str, ui: Console) -> Iterator[tuple[Tensor, Tensor]]:
    return ui.track(images.eval_batches("test", batch_size=BATCH), total=math.ceil(images.info.n_test / BATCH), label=label)


def _require_accuracy(path: Path, found: float | None, expected: float | None) -> None:
    """Raises VerificationFailed if the file, in full precision, is not as accurate as its run was on the same images."""
    if found is not None and expected is not None and abs(found - expected) > RUN_SLACK:
        raise VerificationFailed(
            f"{path.name} has {found:.2f} % on the test images where its run had {expected:.2f} %: "
            "are they the same images? Name their folder with --data-dir"
        )


def _report_int8(fp32: ModelProto, model: ModelProto, record: Artifact, images: Dataset, ui: Console) -> float:
    """The accuracy in FP32 on the test split; where INT8 lost more than a point against it, says which layers lost most.

    fp32: the graph of the same input, pixels or normalised values, in full precision."""
    assert record.accuracy is not None
    full = verify.accuracy(verify.classifier(fp32, record.input), _test_split(images, "accuracy in FP32", ui)).top1
    if full - record.accuracy <= PRECISION_SLACK:
        return full
    size = graph.static_batch(fp32) or FEW
    few = images.sample(size, seed=0, split="val")[0].numpy()
    few = np.resize(few, (size, *few.shape[1:]))
    worst = quantize.layer_errors(fp32, model, pixels_of(few, record.input) if record.input.dtype == "uint8" else few)[:5]
    layers = ", ".join(f"{e.layer} ({e.signal_to_noise_db:.0f} dB)" for e in worst)
    ui.warn(f"INT8 has {record.accuracy:.2f} % where FP32 has {full:.2f} %; the layers with the lowest signal-to-noise ratio: {layers}")
    return full


def _estimated(half: ModelProto | None, record: Artifact, precision: str, images: Dataset, ui: Console) -> dict[str, Any]:
    """What a precision that the engine build brings in costs in accuracy: the same graph in it, in ONNX Runtime.

    It rounds weights to FP16 and, on a CPU, sums in FP32; what an engine makes of it may differ (`_check_range`)."""
    if half is None:
        return {"estimated_accuracy": None, "estimated_reason": "it needs onnxconverter-common: pip install 'prunectl[fp16]'"}
    assert record.accuracy is not None
    found = verify.accuracy(verify.classifier(half, record.input), _test_split(images, f"accuracy in {precision}", ui)).top1
    ui.say(f"in {precision}, which the engine build turns to, ONNX Runtime has {found:.2f} % of the test images right")
    if (lost := record.accuracy - found) > PRECISION_SLACK:
        ui.warn(f"{precision} costs this network {lost:.2f} points of test accuracy in ONNX Runtime: build in fp32")
    return {"estimated_accuracy": found, "estimated_by": f"ONNX Runtime, the same graph in {precision}"}


def _entry(path: Path, record: Artifact) -> dict[str, Any]:
    kept = {k: v for k, v in record.to_dict().items() if k not in IN_THE_RECORD_ONLY}
    return {"path": str(path.resolve()), **kept, "record": str(record_path(path).resolve())}


def _precision(artifact: Mapping[str, Any]) -> str:
    """Of the file, and of the engine where that is another."""
    asked, computes = artifact["precision"], artifact.get("graph_precision", artifact["precision"])
    return str(asked) if artifact["kind"] != "onnx" or asked == computes else f"{computes}; {asked} in the engine"


def show(result: dict[str, Any], ui: Console) -> None:
    rows = [
        [Path(a["path"]).name, a["kind"], _precision(a), f"{a['bytes']:,}", None if a["accuracy"] is None else f"{a['accuracy']:.2f}"]
        for a in result["artifacts"]
    ]
    ui.table(f"{result['model']} for {result['profile']}", ["file", "kind", "precision", "bytes", "test accuracy, %"], rows)
    if result["artifacts"]:
        ui.say(f"in {Path(result['artifacts'][0]['path']).parent}")
    for entry in result["artifacts"][1:]:
        if entry.get("host"):
            ui.say(f"on {entry['host']}: {entry['path']}")
    for finding in result["lint"]:
        ui.say(f"lint: {finding['node']}: {finding['message']}; {finding['remedy']}")
    for text in filter(None, (result["zeros"], result["note"])):
        ui.say(text)
