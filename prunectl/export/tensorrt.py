"""Engines built on this machine: by TensorRT for the GPU it has, or by TensorRT for RTX for GPUs it has not.

An engine fits one TensorRT version and one kind of GPU, so it is cached under a key of everything it depends on, and
ONNX is what gets shipped. The building itself runs in a process of its own (`trt_build`)."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunectl.errors import CorruptFile, DeviceUnavailable, UsageError, VerificationFailed
from prunectl.export.artifact import writing
from prunectl.export.lint import Finding
from prunectl.export.profiles import Profile
from prunectl.files import atomic, sha256, write_json

WORKSPACE_MB = 2048
TIMEOUT_S = 1800.0
# What TensorRT for RTX compiles for without a GPU: Ampere, Ada and Blackwell. Turing (SM75) has no FP32 products there.
CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")


@dataclass(frozen=True)
class Compiler:
    """A TensorRT that can build here. backend: its Python module. gpus: the GPU, or the compute capabilities, it builds for."""

    backend: str
    version: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """A built engine. flags: the builder flags that were set; cached: it was there already, for the same key."""

    path: Path
    sha256: str
    bytes: int
    compiler: Compiler
    precision: str
    flags: tuple[str, ...]
    build_s: float
    cached: bool


def local_compiler() -> Compiler:
    """TensorRT with the GPU of this machine. Raises DeviceUnavailable with what is missing and where to go instead."""
    elsewhere = "build on the board with --host, ahead of time with --profile rtx, or ship the bundle"
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"this machine has no usable NVIDIA GPU, and engines are built on the GPU they run on: {elsewhere}")
    probe = _probe("tensorrt", f"TensorRT's Python module is missing (pip install 'prunectl[trt]'): {elsewhere}")
    if not probe["builder"]:
        raise DeviceUnavailable(f"TensorRT {probe['version']} here has no builder: {elsewhere}")
    major, minor = torch.cuda.get_device_capability()
    return Compiler("tensorrt", probe["version"], (f"{torch.cuda.get_device_name()} (SM{major}{minor})",))


def rtx_compiler(capabilities: Sequence[str] = CAPABILITIES) -> Compiler:
    """TensorRT for RTX, which compiles without a GPU. Raises DeviceUnavailable if it is not installed."""
    probe = _probe(
        "tensorrt_rtx", "TensorRT for RTX is missing: pip install 'prunectl[rtx]', or --profile gpu for the same ONNX file alone"
    )
    return Compiler("tensorrt_rtx", probe["version"], tuple(capabilities))


def engine_key(onnx_sha256: str, compiler: Compiler, *, precision: str, flags: Sequence[str] = ()) -> str:
    """16 hex digits over everything that makes an engine another engine."""
    parts = [onnx_sha256, compiler.backend, compiler.version, *compiler.gpus, precision, *sorted(flags)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build(
    onnx: Path,
    compiler: Compiler,
    folder: Path,
    *,
    profile: Profile,
    precision: str = "fp32",
    sparse: bool = False,
    batch: int = 1,
    workspace_mb: int = WORKSPACE_MB,
    timeout_s: float = TIMEOUT_S,
) -> Engine:
    """The engine of an ONNX file in `folder`, named after the file and its key; an earlier one of the same key if whole.

    sparse: lets 2:4 zeros be skipped. batch: the largest, for a file with a free one. Raises UsageError, DeviceUnavailable
    if the compiler is killed or hangs, VerificationFailed if it refuses the file."""
    profile.check_precision(precision)
    if sparse:
        profile.check_sparsity("2:4")
    if not onnx.is_file():
        raise UsageError(f"{onnx} is not a file; expected an ONNX model")
    asked = [*(["sparse"] if sparse else []), f"batch={batch}", f"workspace_mb={workspace_mb}"]
    key = engine_key(sha256(onnx), compiler, precision=precision, flags=asked)
    path = folder / f"{onnx.stem}-{key}.engine"
    if (found := _cached(path)) is not None:
        return found
    job = {
        "action": "build",
        "onnx": str(onnx.resolve()),
        "precision": precision,
        "in_graph": profile.fp16 == "graph",
        "sparse": sparse,
        "batch": batch,
        "workspace_mb": workspace_mb,
        "capabilities": list(compiler.gpus) if compiler.backend == "tensorrt_rtx" else [],
    }
    with writing(path), atomic(path) as draft:
        done = _run(compiler.backend, {**job, "engine": str(draft)}, f"building the engine of {onnx.name}", timeout_s)
    engine = Engine(
        path=path,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        compiler=compiler,
        precision=precision,
        flags=tuple(done["flags"]),
        build_s=done["build_s"],
        cached=False,
    )
    with writing(path):
        write_json(_beside(path), {**asdict(engine), "path": path.name})
    return engine


def refusals(onnx: Path, compiler: Compiler, *, profile: Profile, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """What the compiler's own parser holds against a file; empty if it takes it."""
    job = {"action": "parse", "onnx": str(onnx.resolve()), "in_graph": profile.fp16 == "graph"}
    answer = _ask(compiler.backend, job, f"parsing {onnx.name}", timeout_s)
    reader = f"{compiler.backend} {compiler.version}"
    found = answer.get("findings", [])
    return [Finding(node, operator, "parser", f"{reader}: {text}", "change the layer or the profile") for node, operator, text in found]


def _cached(path: Path) -> Engine | None:
    record = _beside(path)
    if not (path.is_file() and record.is_file()):
        return None
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        gpus = tuple(fields["compiler"].pop("gpus"))
        compiler = Compiler(**fields.pop("compiler"), gpus=gpus)
        found = Engine(**{**fields, "path": path, "compiler": compiler, "flags": tuple(fields["flags"]), "cached": True})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CorruptFile(f"{record} is not the record of an engine ({problem}); remove it and {path.name}") from problem
    return found if found.sha256 == sha256(path) else None


def _beside(engine: Path) -> Path:
    return engine.with_suffix(".engine.json")


def _probe(backend: str, missing: str) -> dict[str, Any]:
    answer = _ask(backend, {"action": "probe"}, f"loading {backend}", 120.0)
    if "ok" not in answer:
        raise DeviceUnavailable(f"{missing} ({answer['message']})")
    return dict(answer["ok"])


def _run(backend: str, job: Mapping[str, Any], what: str, timeout_s: float) -> dict[str, Any]:
    answer = _ask(backend, job, what, timeout_s)
    if "ok" in answer:
        return dict(answer["ok"])
    if answer["kind"] == "missing":
        raise DeviceUnavailable(f"{backend} is not installed ({answer['message']})")
    if answer["kind"] == "precision":
        raise UsageError(f"{what}: {answer['message']}; export with --profile gpu")
    raise VerificationFailed(f"{what}: {backend} refuses it: {answer['message']}")


def _ask(backend: str, job: Mapping[str, Any], what: str, timeout_s: float) -> dict[str, Any]:
    """The answer of a building process. Raises DeviceUnavailable if it crashes, is killed or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = json.dumps({**job, "backend": backend, "result": str(result)})
        command = [sys.executable, "-m", "prunectl.export.trt_build"]
        try:
            done = subprocess.run(command, input=request, text=True, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise DeviceUnavailable(f"{what} took more than {timeout_s:.0f} s and was stopped") from None
        if result.is_file():
            return dict(json.loads(result.read_text(encoding="utf-8")))
    if done.returncode == -signal.SIGKILL:
        raise DeviceUnavailable(f"{what} was killed, most likely for lack of memory: lower the workspace, close programs or add swap")
    if done.returncode < 0:
        raise DeviceUnavailable(f"{what} crashed in {backend} ({signal.Signals(-done.returncode).name})")
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise DeviceUnavailable(f"{what} failed in {backend}: {last}")
