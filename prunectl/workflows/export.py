"""`prunectl export`: a saved network as an ONNX file, and an engine, proven to be the network.

Build the graph for one profile, count its work again, compare its answers with torch's on real and random images, write
it, then measure the written FILE on the test split. Whatever fails leaves no file behind that looks finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import Tensor, nn

from prunectl import data
from prunectl.console import Console
from prunectl.data import Dataset
from prunectl.errors import DataMissing, UsageError, VerificationFailed
from prunectl.export import graph, lint, onnx, quantize, sparsity, verify
from prunectl.export.artifact import Artifact, InputSpec, Provenance, record_path, write_record
from prunectl.export.profiles import Profile
from prunectl.export.profiles import load as load_profile
from prunectl.export.session import load_onnx_session
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.recipe import Recipe, Sfw, read_back
from prunectl.rundir import RunDir
from prunectl.training import compactmodel
from prunectl.workflows import engine
from prunectl.workflows.session import versions
from prunectl.workflows.sweep import calibration_images, pruned, pruned_nm

COMPARED = 256  # real images that torch and the graph both answer
CALIBRATION = 512  # training images that set INT8's ranges
BATCH = 250
INT8_SLACK = 1.0  # points of accuracy below which a per-layer report is due
RUN_SLACK = 2.0  # points: a run may have been measured in bfloat16, which decides close calls otherwise; no file is further off
FINAL = {"train": "top1", "find-ticket": "final", "sfw-prune": "dense"}  # what a verb calls the accuracy of the network it leaves


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
    saved = compactmodel.read(compactmodel.locate(request.path))
    profile, place = _target(request)
    request = replace(request, profile=profile.name)
    pattern = _checked(request, profile)
    target = target_of(request)
    images = _images(saved, request, ui)
    module = _network(saved, request, pattern)
    ui.say(f"writing {target.name}: opset {profile.opset}, for {profile.reader}")
    spec = InputSpec.from_data(saved.plan["data"])
    fp32 = onnx.build(module, spec, profile, batch=request.batch)
    verify.require_cost(verify.recount(module, fp32, spec))
    spec = spec.of_pixels() if request.uint8_input else spec
    model = onnx.lowered(fp32, spec, profile, request.precision, _calibration(images, request, ui))
    measured = _proof(module, model, spec, images, profile.graph_precision(request.precision), profile, ui)
    zeros = sparsity.measure(model, n=pattern[0], m=pattern[1]) if pattern else sparsity.measure(model)
    if pattern:
        sparsity.require_pattern(zeros)
    pruning = {"steps": len(saved.plan["steps"]), "params": saved.plan["params"]}
    provenance = Provenance(saved.plan["parent"], pruning, saved.plan["weights_sha256"])
    record = onnx.save(model, target, spec=spec, profile=profile, precision=request.precision, provenance=provenance, measured=measured)
    if images is not None:
        record = _measured_file(target, record, images, ui)
        _require_accuracy_of_run(target, record, saved, request)
        if request.precision == "int8":
            _report_int8(fp32, model, record, images, saved, ui)
    artifacts, note = [_entry(target, record)], None
    if place is not None:
        built, note = engine.build(place, target, record, profile, sparse=pattern is not None, ui=ui)
        artifacts.append({**artifacts[0], **built})
    recipe = _recipe_of(saved.path)
    return {
        "schema": 1,
        "verb": "export",
        "run": str(_run_of(saved.path)),
        "outcome": "bundled" if isinstance(place, engine.Nowhere) else "exported",
        "model": saved.plan["model"]["name"],
        "dataset": saved.plan["data"]["name"],
        "seed": recipe.seed if recipe else None,
        "profile": profile.name,
        "artifacts": artifacts,
        "lint": [asdict(f) for f in lint.lint(target, profile)],
        "zeros": zeros.statement if request.sparsity else None,
        "note": note,
        "wall_s": time.perf_counter() - started,
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
    folder = compactmodel.locate(request.path)
    parent = request.out or _run_of(folder) / "export"
    return parent / f"{_stem(folder, request)}-{request.profile}-{request.precision}.onnx"


def _target(request: Request) -> tuple[Profile, engine.Place | None]:
    """The profile that was named or fits what is there, and where its engine is built; None where none was asked for."""
    profile = load_profile(request.profile) if request.profile else None
    if not (request.trt or request.host or (profile and profile.ahead_of_time)):
        return profile or load_profile("cpu"), None
    place = engine.place(profile, request.host)
    return profile or load_profile(engine.default_profile(place)), place


def _checked(request: Request, profile: Profile) -> tuple[int, int] | None:
    """N:M if the request names a pattern. Raises UsageError for what the profile does not take, before any work is done."""
    profile.check_precision(request.precision)
    profile.check_batch(request.batch)
    if request.uint8_input and profile.types is not None and "UINT8" not in profile.types:
        raise UsageError(f"--uint8-input with profile {profile.name}: {profile.reader} has no UINT8 tensors; normalise on the host")
    if request.sparsity is None or ":" not in request.sparsity:
        return None
    n, _, m = request.sparsity.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise UsageError(f"--sparsity {request.sparsity}: expected N:M with N below M, e.g. 2:4, or a share such as 0.9")
    profile.check_sparsity(f"{int(n)}:{int(m)}")
    return int(n), int(m)


def _network(saved: compactmodel.CompactModel, request: Request, pattern: tuple[int, int] | None) -> nn.Module:
    """The saved network, pruned once if that was asked for."""
    if pattern is not None:
        n, m = pattern
        return _swept(saved, request, lambda network, _: pruned_nm(network, n, m))
    if request.sparsity is None:
        return saved.module()
    try:
        share = float(request.sparsity)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--sparsity {request.sparsity}: expected a share between 0 and 1, e.g. 0.9, or a pattern such as 2:4")
    return _swept(saved, request, lambda network, settings: pruned(network, share, settings))


def _swept(saved: compactmodel.CompactModel, request: Request, prune: Callable[[nn.Module, Sfw], nn.Module]) -> nn.Module:
    """The saved network pruned once, as one row of a sweep: batch norm re-estimated on the training images of its run.

    What is ranked and how comes from the run's recipe, or is the default of sfw-prune. Raises DataMissing."""
    recipe = _recipe_of(saved.path)
    settings = (recipe.sfw if recipe else None) or Sfw()
    module = prune(saved.module(), settings)
    if settings.bn_recal:
        part = {"val_fraction": recipe.data.val_fraction, "train_images": recipe.data.train_images} if recipe else {}
        recalibrate_(module, calibration_images(_dataset(saved, request, **part), settings.bn_recal))
    return module


def _recipe_of(folder: Path) -> Recipe | None:
    """What the run that holds a saved network was asked for, where there is one."""
    run = RunDir(_run_of(folder))
    return read_back(run.recipe) if run.recipe.is_file() else None


def _run_of(folder: Path) -> Path:
    return folder.resolve().parent if (folder.resolve().parent / "recipe.yaml").is_file() else folder.resolve()


def _stem(folder: Path, request: Request) -> str:
    parts = [folder.resolve().name, *(["s" + request.sparsity.replace(":", "of")] if request.sparsity else [])]
    if request.uint8_input:
        parts.append("uint8")
    if request.batch != 1:
        parts.append(f"b{request.batch}" if request.batch else "dynamic")
    return "-".join(parts)


def _images(saved: compactmodel.CompactModel, request: Request, ui: Console) -> Dataset | None:
    """The network's own data set, seen as the network saw it; None, with a warning, where it is not at hand."""
    try:
        return _dataset(saved, request)
    except DataMissing as e:
        if request.precision == "int8":
            raise
        ui.warn(f"the file was compared on random images only and its accuracy not measured: {e}")
        return None


def _dataset(saved: compactmodel.CompactModel, request: Request, **part: Any) -> Dataset:
    """part: `val_fraction` and `train_images`, where not all the training images were trained on."""
    info, recipe = saved.plan["data"], _recipe_of(saved.path)
    folder = request.data_dir or (recipe.data.dir if recipe else None)
    fit = info["fit"] if info["fit"] in ("pad", "resize") else "pad"
    return data.load(info["name"], data_dir=folder, image_size=info["image_size"], fit=fit, **part)


def _calibration(images: Dataset | None, request: Request, ui: Console) -> Iterator[Tensor]:
    if request.precision == "int8" and images is not None:
        ui.say(f"calibrating INT8 on {CALIBRATION} training images")
        pixels, _ = images.sample(CALIBRATION, seed=0, split="train")
        step = request.batch or BATCH
        yield from (chunk for chunk in pixels.split(step) if len(chunk) == step)


def _proof(
    module: nn.Module, model: ModelProto, spec: InputSpec, images: Dataset | None, precision: str, profile: Profile, ui: Console
) -> dict[str, float]:
    """max_abs_diff and top1_agreement of the graph against torch. Raises VerificationFailed when they differ too far."""
    session = verify.classifier(model, spec)
    size = graph.static_batch(model) or 64
    random = verify.compare(module, session, verify.random_batches(spec, n=8 * size if size < 8 else size), images="random")
    verify.require_same(random, precision)
    real = random
    if images is not None:
        pixels, _ = images.sample(COMPARED // size * size or size, seed=0, split="val")
        real = verify.compare(module, session, [chunk.numpy() for chunk in pixels.split(size) if len(chunk) == size])
        verify.require_same(real, precision)
    ui.say(
        f"{profile.name}, {precision}: the graph answers as torch does on {real.n} {real.images} and {random.n} random images "
        f"(largest difference {real.max_abs:.2g}, {real.max_rel:.1g} of the largest logit; top-1 agreement {real.top1_agreement:.1f} %)"
    )
    return {"max_abs_diff": max(real.max_abs, random.max_abs), "top1_agreement": real.top1_agreement}


def _measured_file(path: Path, record: Artifact, images: Dataset, ui: Console) -> Artifact:
    """The record with the accuracy of the file as it was written, on the test split."""
    found = verify.accuracy(load_onnx_session(path), _test_split(images, f"accuracy of {path.name}", ui))
    ui.say(f"{path.name}: {found.top1:.2f} % of {found.n} test images, {record.bytes:,} bytes")
    record = replace(record, accuracy=found.top1)
    write_record(path, record)
    return record


def _test_split(images: Dataset, label: str, ui: Console) -> Iterator[tuple[Tensor, Tensor]]:
    return ui.track(images.eval_batches("test", batch_size=BATCH), total=math.ceil(images.info.n_test / BATCH), label=label)


def _require_accuracy_of_run(path: Path, record: Artifact, saved: compactmodel.CompactModel, request: Request) -> None:
    """Where its run measured this very network on these images, the file must be as accurate; it is removed if it is not.

    Raises VerificationFailed."""
    run = RunDir(_run_of(saved.path))
    if request.sparsity or request.precision == "int8" or not run.finished or compactmodel.locate(run.path) != saved.path.resolve():
        return
    result = run.read_result()
    accuracy = result.get("accuracy", {})
    expected = accuracy.get(FINAL.get(result.get("verb", ""), ""))
    if expected is None or record.accuracy is None or accuracy.get("split", "test") != "test":
        return
    if abs(record.accuracy - expected) > RUN_SLACK:
        path.unlink()
        record_path(path).unlink()
        raise VerificationFailed(
            f"{path.name} has {record.accuracy:.2f} % on the test images where its run had {expected:.2f} %: "
            "are they the same images? Name their folder with --data-dir"
        )


def _report_int8(
    fp32: ModelProto, model: ModelProto, record: Artifact, images: Dataset, saved: compactmodel.CompactModel, ui: Console
) -> None:
    """Where INT8 lost more than a point against FP32 on the test split, the layers that lost most."""
    assert record.accuracy is not None
    spec = InputSpec.from_data(saved.plan["data"])
    full = verify.accuracy(verify.classifier(fp32, spec), _test_split(images, "accuracy in FP32", ui)).top1
    if full - record.accuracy <= INT8_SLACK:
        return
    size = graph.static_batch(fp32) or 8
    pixels, _ = images.sample(size, seed=0, split="val")
    worst = sorted(quantize.layer_errors(fp32, model, pixels.numpy()), key=lambda e: e.signal_to_noise_db)[:5]
    layers = ", ".join(f"{e.layer} ({e.signal_to_noise_db:.0f} dB)" for e in worst)
    ui.warn(f"INT8 has {record.accuracy:.2f} % where FP32 has {full:.2f} %; the layers with the lowest signal-to-noise ratio: {layers}")


def _entry(path: Path, record: Artifact) -> dict[str, Any]:
    fields = record.to_dict()
    kept = (
        "kind",
        "profile",
        "precision",
        "sha256",
        "bytes",
        "opset",
        "ir",
        "params",
        "macs",
        "max_abs_diff",
        "top1_agreement",
        "accuracy",
    )
    return {"path": str(path.resolve()), **{k: fields[k] for k in kept}, "record": str(record_path(path).resolve())}


def show(result: dict[str, Any], ui: Console) -> None:
    rows = [
        [Path(a["path"]).name, a["kind"], a["precision"], f"{a['bytes']:,}", None if a["accuracy"] is None else f"{a['accuracy']:.2f}"]
        for a in result["artifacts"]
    ]
    ui.table(f"{result['model']} for {result['profile']}", ["file", "kind", "precision", "bytes", "test accuracy, %"], rows)
    if result["artifacts"]:
        ui.say(f"in {Path(result['artifacts'][0]['path']).parent}")
    for entry in result["artifacts"][1:]:
        if entry.get("host"):
            ui.say(f"on {entry['host']}: {entry['path']}")
    for text in filter(None, (result["zeros"], result["note"])):
        ui.say(text)
