"""What a bench is asked and what it saw: frozen, and equal to its JSON.

A RawBench holds raw numbers only (stamps, latencies, sensor readings), so any report can be computed again from its file.
All stamps of one record are of one monotonic clock, in ns; only their differences mean anything."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prunectl import files
from prunectl.errors import CorruptFile, UnknownName, UsageError

SCHEMA = 1
LATEST = 2**62  # of stamps, in ns: 146 years after the clock's start
KINDS = ("refresh", "idle", "load", "train")
MOST = 1e6  # of any setting: more is a slip of the finger (12 days of repeats or seconds)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to measure; the defaults are the protocol of an honest joule on a board (deploy/README.md).

    python, trtexec, train_python name programs on the board; None: found there. train_batch None: the run's own batch."""

    precision: str = "fp16"
    warmup_s: float = 5.0
    duration_s: float = 60.0
    iterations: int = 200  # at least so many inferences in a window
    repeats: int = 5
    idle_s: float = 30.0
    period_ms: float = 50.0
    refresh_probe_s: float = 5.0
    workspace_mb: int = 1024
    sparsity: str = "disable"
    spin_wait: bool = False
    threads: int | None = None  # cpu only; None: every core this process may use
    build_timeout_s: float = 1800.0
    slack_s: float = 60.0  # what anything may take beyond its plan before it counts as hung
    trtexec: str | None = None
    python: tuple[str, ...] = ("python3",)
    train_python: str | None = None
    train_steps: int = 100  # optimizer steps in a window
    train_batch: int | None = None

    def __post_init__(self) -> None:
        bounds = {"warmup_s": 0, "duration_s": 1e-3, "iterations": 1, "repeats": 1, "idle_s": 0, "period_ms": 1, "refresh_probe_s": 0}
        bounds |= {"workspace_mb": 1, "build_timeout_s": 1e-3, "slack_s": 0, "threads": 1, "train_steps": 1, "train_batch": 2}
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise UsageError(f"bench {name} = {value}: must be at least {least:g}, and at most {MOST:g}.")
        if self.precision not in ("fp32", "fp16", "int8"):
            raise UsageError(f"bench precision = '{self.precision}': must be fp32, fp16 or int8.")
        if self.sparsity not in ("disable", "enable"):
            raise UsageError(f"bench sparsity = '{self.sparsity}': must be disable or enable.")

    @classmethod
    def for_host(cls, **changes: Any) -> Settings:
        """The defaults where windows are cheap and clocks are not ours: shorter windows, more repeats."""
        defaults: dict[str, Any] = {"precision": "fp32", "warmup_s": 1.0, "duration_s": 5.0, "repeats": 10, "idle_s": 10.0}
        defaults["train_steps"] = 20
        return cls(**(defaults | changes))

    def but(self, changes: Mapping[str, Any]) -> Settings:
        """The same with some settings changed, as YAML gives them. Raises UsageError for an unknown name or a value that does not fit."""
        return dataclasses.replace(self, **{name: _setting(name, value) for name, value in changes.items()})

    def quick(self) -> Settings:
        """A short bench, for a first look: its report says that its windows are short."""
        limits = {
            "warmup_s": 0.2,
            "duration_s": 0.7,
            "iterations": 20,
            "repeats": 5,
            "idle_s": 1.0,
            "refresh_probe_s": 1.0,
            "train_steps": 5,
        }
        return dataclasses.replace(self, **{name: min(getattr(self, name), most) for name, most in limits.items()})


# annotation of a setting -> what to call it, types that it takes
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "int | None": ("a whole number or null", (int, type(None))),
    "float": ("a number", (int, float)),
    "str": ("a word", (str,)),
    "str | None": ("a word or null", (str, type(None))),
    "tuple[str, ...]": ("a list of words", (tuple,)),
}


def _setting(name: str, value: Any) -> Any:
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Settings)}
    if name not in kinds:
        raise UnknownName("bench setting", name, kinds)
    called, types = _KINDS[kinds[name]]
    if tuple in types and isinstance(value, (str, list)):
        value = tuple(shlex.split(value) if isinstance(value, str) else map(str, value))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UsageError(f"bench {name} = {value!r}: expected {called}.")
    return value


@dataclass(frozen=True)
class OnnxModel:
    """A file to time. batch: images in one inference, where the file leaves it open; shapes: trtexec's words for an open input.

    precision: what its graph computes in, where that is known; typed: TensorRT is to compute in the graph's types and no others.
    weights: files beside it that hold some of its tensors."""

    path: Path
    name: str
    batch: int = 1
    shapes: str | None = None
    precision: str = "as exported"
    typed: bool = False
    weights: tuple[Path, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the file, or of the digests of all files that make the network up."""
        digests = [files.sha256(path) for path in (self.path, *self.weights)]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class TrainModel:
    """A torch module to train for some synthetic steps; input_shape: (N, C, H, W)."""

    module: Any
    name: str
    input_shape: tuple[int, int, int, int]
    num_classes: int
    steps: int = 100
    warmup_steps: int = 5


@dataclass(frozen=True)
class Job:
    """What to measure. The first model is what the others are compared with; so is the first of `train`."""

    models: tuple[OnnxModel, ...] = ()
    train: tuple[TrainModel, ...] = ()


@dataclass(frozen=True)
class Rail:
    """One power sensor. unit mW: power now; uJ: a counter, starting again at `wrap`. step_mw: its resolution, where that is known."""

    name: str
    unit: str
    wrap: int | None = None
    step_mw: float | None = None


@dataclass(frozen=True)
class Power:
    """Sensor readings: values[rail][i] was read at t_ns[i], None where the rail did not answer. Without a sensor, the reason."""

    source: str | None
    reason: str | None
    period_ms: float | None = None
    rails: tuple[Rail, ...] = ()
    t_ns: tuple[int, ...] = ()
    values: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    skipped: tuple[Mapping[str, str], ...] = ()
    sampler: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Telemetry:
    """Clocks, temperatures and loads, about once a second; the unit is the name's suffix."""

    t_ns: tuple[int, ...] = ()
    values: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """A stretch of time with one thing going on. kind: refresh, idle, load (inference), train (optimizer steps).

    latency_ns: one entry for each inference or step between start_ns and end_ns. details: commands, loss, ..."""

    kind: str
    artifact: int | None
    repeat: int
    start_ns: int
    end_ns: int
    latency_ns: tuple[int, ...] = ()
    wall_offset_s: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """What ran. kind: engine, onnx, module, traced. batch: images in one inference or step."""

    name: str
    kind: str
    sha256: str | None
    batch: int
    precision: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """How the run that was measured trained: optimizer steps of the batch that was measured, dense and with the ticket.

    dense, ticket: names of artifacts. dense_steps: of a whole schedule without pruning. search_steps: dense steps until the
    ticket was drawn, forward passes of probe and repair included as the share of a step that they cost."""

    run: str
    dense: str
    ticket: str
    dense_steps: float
    search_steps: float
    ticket_steps: float


@dataclass(frozen=True)
class RawBench:
    """training: of the run that the artifacts belong to; None with training_reason where nothing is known of it."""

    device: str
    simulated: bool
    artifacts: tuple[Artifact, ...]
    windows: tuple[Window, ...]
    power: Power
    telemetry: Telemetry = Telemetry()
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    simulated_by: tuple[str, ...] = ()
    train_reason: str | None = None
    training: Training | None = None
    training_reason: str | None = None
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Any, *, source: str = "the record") -> RawBench:
        """Raises CorruptFile naming `source` and the first thing that is not as it should be."""
        from pydantic import ValidationError

        try:
            if raw["schema"] != SCHEMA:
                raise CorruptFile(f"{source} is of schema {raw['schema']}, this release reads {SCHEMA}: measure again.")
            power = dict(raw["power"])
            power["rails"] = tuple(_make(Rail, rail) for rail in power["rails"])
            bench = _make(cls, dict(raw) | {
                "artifacts": tuple(_make(Artifact, a) for a in raw["artifacts"]),
                "windows": tuple(_make(Window, w) for w in raw["windows"]),
                "power": _make(Power, power),
                "training": _make(Training, raw["training"]) if raw.get("training") else None,
                "telemetry": _make(Telemetry, raw["telemetry"]),
            })  # fmt: skip
            _adapter().validate_json(json.dumps(bench.to_dict()), strict=True)
            bench._check()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise CorruptFile(f"{source} is no raw bench record: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{source} is no raw bench record: {type(error).__name__}: {error}.") from None
        return bench

    def _check(self) -> None:
        for artifact in self.artifacts:
            if artifact.batch < 1:
                raise ValueError(f"an artifact called {artifact.name!r} of batch {artifact.batch!r}")
        for series in (self.power, self.telemetry):
            if any(abs(t) > LATEST for t in series.t_ns):
                raise ValueError("stamps beyond any clock")
            for name, values in series.values.items():
                if len(values) != len(series.t_ns):
                    raise ValueError(f"{len(values)} readings of {name} for {len(series.t_ns)} stamps")
        for rail in self.power.rails:
            if rail.name not in self.power.values:
                raise ValueError(f"no readings of rail {rail.name}")
        for window in self.windows:
            if window.artifact is not None and window.artifact not in range(len(self.artifacts)):
                raise ValueError(f"a window of artifact {window.artifact}, and {len(self.artifacts)} artifacts")
            if window.end_ns < window.start_ns or max(abs(window.start_ns), window.end_ns, *window.latency_ns, 0) > LATEST:
                raise ValueError(f"a {window.kind} window from {window.start_ns} to {window.end_ns} ns")
            if window.kind in ("load", "train") and (window.artifact is None or not window.latency_ns or window.end_ns == window.start_ns):
                raise ValueError(f"a {window.kind} window of nothing")
            if window.kind not in KINDS:
                raise ValueError(f"a window of kind {window.kind!r}, and there are {', '.join(KINDS)}")
            if min(window.latency_ns, default=0) < 0:
                raise ValueError(f"a {window.kind} window with a latency below 0")
        for kind in ("load", "train"):
            repeats = [sorted(w.repeat for w in self.windows if w.kind == kind and w.artifact == i) for i in range(len(self.artifacts))]
            if len({tuple(r) for r in repeats if r}) > 1 or any(len(set(r)) < len(r) for r in repeats):
                raise ValueError(f"{kind} windows of repeats {' and '.join(map(str, repeats))}")
        known = [artifact.name for artifact in self.artifacts]
        if len({(a.name, a.kind) for a in self.artifacts}) < len(known):  # what is run and what is trained of one network share its name
            raise ValueError(f"artifacts of one name: {', '.join(known)}")
        if self.training is not None and not {self.training.dense, self.training.ticket} <= set(known):
            raise ValueError(f"a training of {self.training.dense} and {self.training.ticket}, and artifacts {known}")

    def write(self, path: Path) -> Path:
        """The record as JSON at `path`: a whole file or none."""
        files.write_text(path, json.dumps(self.to_dict()))
        return path

    @classmethod
    def read(cls, path: Path) -> RawBench:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; expected the raw.json of a bench.") from None
        except ValueError as error:
            raise CorruptFile(f"{path} is not JSON ({error}); expected the raw.json of a bench.") from None
        bench = cls.from_dict(raw, source=str(path))
        if not any(window.kind in ("load", "train") for window in bench.windows):
            raise CorruptFile(f"{path} is no raw bench record: it has no window of inference or training.")
        return bench


@functools.cache
def _adapter() -> Any:
    """What checks the type of every field."""
    from pydantic import TypeAdapter

    return TypeAdapter(RawBench)


def _make(kind: type[T], values: Mapping[str, Any]) -> T:
    """The record `kind` of its JSON. Keys it has no field for go into its `details`, if it has that."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = {name: _frozen(value) for name, value in values.items() if name in names}
    extra = {name: value for name, value in values.items() if name not in names}
    if extra and "details" in names:
        known["details"] = {**values.get("details", {}), **extra}
    return kind(**known)


def _frozen(value: Any) -> Any:
    """Lists as tuples, in a value and in the values of a mapping one level down."""
    if isinstance(value, Mapping):
        return {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
