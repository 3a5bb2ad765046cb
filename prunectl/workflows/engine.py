"""Where the engine of an exported file gets built: ahead of time for RTX, by the TensorRT here, on a board by the agent that
bench streams there, or, where nothing can build it now, later from a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.bench.board import agent_path, build_engines, measure
from prunectl.bench.devices import jetson_host
from prunectl.bench.records import Job, OnnxModel, Settings
from prunectl.bench.ssh import checked_host
from prunectl.console import Console
from prunectl.errors import DeviceUnavailable, UsageError, VerificationFailed
from prunectl.export import bundle, tensorrt
from prunectl.export.artifact import Artifact
from prunectl.export.profiles import Profile, load
from prunectl.export.tensorrt import Compiler
from prunectl.files import sha256

LARGEST_BATCH = 8  # of an engine whose file leaves the batch free
NEWEST_TX2 = 32  # L4T release of JetPack 4, the TX2's last; JetPack 5 and 6 are 34 to 36


@dataclass(frozen=True)
class Board:
    """A board that its agent builds on. host: None for this machine, a Jetson."""

    host: str | None

    @property
    def name(self) -> str:
        return self.host or "this machine"


@dataclass(frozen=True)
class Nowhere:
    """No engine can be built now, for this reason."""

    reason: str


Place = Compiler | Board | Nowhere


def place(profile: Profile | None, host: str | None) -> Place:
    """Where engines for `profile` are built: the board that was named, TensorRT here, a Jetson that is known, nowhere.

    Raises UsageError if the profile has no engines or the host is none of its places, DeviceUnavailable for a profile that is
    compiled ahead of time by what is not installed."""
    if profile is not None and profile.tensorrt is None:
        raise UsageError(
            f"--trt with profile {profile.name}: {profile.reader} runs the ONNX file itself; drop --trt, or name another profile"
        )
    if profile is not None and profile.ahead_of_time:
        if host is not None:
            raise UsageError(f"--host with profile {profile.name}: its engines are compiled on this machine; drop --host")
        return tensorrt.rtx_compiler()
    if host is not None:
        return Board(checked_host(host))
    reason = None
    if profile is None or not profile.board:
        try:
            return tensorrt.local_compiler()
        except DeviceUnavailable as e:
            reason = str(e)
    try:
        return Board(jetson_host(None))
    except DeviceUnavailable as e:
        return Nowhere(reason or str(e))


def default_profile(where: Place, python: tuple[str, ...] = Settings.python) -> str:
    """The name of the profile for what stands there: the newest that a TensorRT here reads, what a board says it is, and for nowhere
    the oldest.

    Raises DeviceUnavailable if a board does not answer, or the TensorRT here is older than every profile."""
    if isinstance(where, Compiler):
        release = tuple(map(int, where.version.split(".")[:2]))
        for name in ("gpu", "orin", "tx2"):
            if release >= (load(name).tensorrt or ()):
                return name
        raise DeviceUnavailable(f"TensorRT {where.version} is older than every export profile: ship the ONNX file of --profile tx2 instead")
    if isinstance(where, Nowhere):
        return "tx2"
    at_once = Settings(repeats=1, idle_s=0, refresh_probe_s=0, warmup_s=0, python=python)
    release = measure(Job(), at_once, host=where.host, say=lambda text: None).environment["l4t"]
    return "orin" if release and int(release.partition(".")[0]) > NEWEST_TX2 else "tx2"


def build(where: Place, model: Path, record: Artifact, profile: Profile, *, sparse: bool, ui: Console) -> tuple[dict[str, Any], str | None]:
    """What differs in the entry of the engine, or of the bundle, from that of its file; and what to say of it.

    sparse: 2:4 zeros may be skipped. Raises DeviceUnavailable, VerificationFailed, UsageError."""
    if isinstance(where, Nowhere):
        return _bundled(where, model, record, sparse)
    ui.say(f"building the engine of {model.name} on {where.name if isinstance(where, Board) else 'this machine'}; this can take minutes")
    built = (
        _on_board(where, model, record, profile, sparse, ui) if isinstance(where, Board) else _here(where, model, record, profile, sparse)
    )
    unmeasured = dict.fromkeys(("max_abs_diff", "top1_agreement", "accuracy"))
    if record.batch is None:
        built["batch"] = [1, LARGEST_BATCH]
        ui.say(f"the engine takes 1 to {LARGEST_BATCH} images a call and is tuned for {LARGEST_BATCH}")
    return {**built, "kind": "engine", **unmeasured, "reason": "an engine runs on its GPU alone: prunectl bench times it there"}, None


def _here(compiler: Compiler, model: Path, record: Artifact, profile: Profile, sparse: bool) -> dict[str, Any]:
    if compiler.backend == "tensorrt":  # TensorRT for RTX has versions of its own
        _check_reader("this machine", compiler.version, profile, record.precision)
    batch = record.batch or LARGEST_BATCH
    made = tensorrt.build(model, compiler, model.parent, profile=profile, precision=record.precision, sparse=sparse, batch=batch)
    facts = {"path": str(made.path.resolve()), "sha256": made.sha256, "bytes": made.bytes, "build_s": made.build_s, "cached": made.cached}
    return {**facts, "host": None, "compiler": f"{compiler.backend} {compiler.version}", "gpus": list(compiler.gpus)}


def _on_board(board: Board, model: Path, record: Artifact, profile: Profile, sparse: bool, ui: Console) -> dict[str, Any]:
    task = OnnxModel(model, model.name, record.batch or LARGEST_BATCH, _shapes(record))
    settings = Settings(precision=record.precision, sparsity="enable" if sparse else "disable")
    (made,) = build_engines((task,), settings, host=board.host, say=ui.say)
    _check_reader(board.name, made.tensorrt, profile, record.precision)
    if made.simulated:
        ui.warn(f"the engine on {board.name} is SIMULATED: {', '.join(made.simulated_by)}")
    facts = {"path": made.path, "sha256": made.sha256, "bytes": made.bytes, "build_s": made.build_s, "cached": made.cached}
    place = {"host": board.name, "compiler": f"trtexec {made.tensorrt}", "gpus": [made.board]}
    return {**facts, **place, "command": list(made.command), "simulated_by": list(made.simulated_by)}


def _shapes(record: Artifact) -> str | None:
    """trtexec's words for the input of a file whose batch is free."""
    sizes = "x".join(map(str, (LARGEST_BATCH, *record.input.shape)))
    return None if record.batch else f"{record.input.name}:{sizes}"


def _check_reader(where: str, version: str, profile: Profile, precision: str) -> None:
    """Raises VerificationFailed if the TensorRT that built the engine is none that the profile writes for.

    Of a board it is known only with the engine: the agent names its TensorRT then."""
    assert profile.tensorrt is not None
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < profile.tensorrt:
        raise VerificationFailed(
            f"{where} has TensorRT {version}, which mis-reads files for {profile.reader}: export with a profile for it, tx2 or orin"
        )
    if major >= 11 and profile.engine_flags(precision):
        raise VerificationFailed(
            f"{where} has TensorRT {version}, which takes its precision from the file, and profile {profile.name} leaves {precision} "
            "to the engine build: export with --profile gpu"
        )


def _bundled(where: Nowhere, model: Path, record: Artifact, sparse: bool) -> tuple[dict[str, Any], str]:
    packed = bundle.write(model.with_suffix(".bundle"), model, agent_path(), sparse=sparse, shapes=_shapes(record))
    note = f"no engine: {where.reason}; wrote the bundle {packed.path}: copy it to the board and run there: {packed.command}"
    return {
        "path": str(packed.path.resolve()),
        "kind": "bundle",
        "bytes": packed.bytes,
        "sha256": sha256(packed.path / bundle.SUMS),
        "command": packed.command,
    }, note
