"""The records an exported file travels with, and the one way a finished file appears: whole, by a rename.

`model.onnx` and `model.json` tell the same story: the JSON adds what only a written file has (its sha256, its size).
The ONNX metadata alone is enough to classify an image with nothing of ours installed."""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prunectl.errors import CorruptFile, UsageError
from prunectl.files import UNFINISHED, sha256, write_json

SCHEMA = 1


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed with and what its outputs mean.

    shape: (C, H, W). mean, std: per channel, of pixels / 255. fit: how an image gets to H x W: `none`, `pad`, `resize` or
    `resize-crop`. native: H = W of the images that `pad` puts a border around; 0 in older files, which do not say.
    dtype: `float32` is normalised input, `uint8` pixels that the graph normalises itself."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    dataset: str
    fit: str = "none"
    native: int = 0
    name: str = "input"
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise UsageError(f"mean {self.mean} and std {self.std} must have one value for each of the {self.shape[0]} channels")
        if min(self.std, default=1.0) <= 0:
            raise UsageError(f"std {self.std}: every value must be positive")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> InputSpec:
        """From the `data` part of a compact model's plan. Raises CorruptFile if that says something else."""
        try:
            size = int(data["image_size"])
            shape = (int(data["channels"]), size, size)
            native = int(data.get("native", 0))
            return cls(shape, tuple(data["mean"]), tuple(data["std"]), tuple(data["classes"]), data["name"], data["fit"], native)
        except (KeyError, TypeError, ValueError, UsageError) as problem:
            what = f"{type(problem).__name__}: {problem}"
            raise CorruptFile(f"the network's plan.json does not say which images it takes ({what}); write the model again") from problem

    def of_pixels(self) -> InputSpec:
        return replace(self, dtype="uint8")

    def to_dict(self) -> dict[str, Any]:
        return dict(_plain(asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> InputSpec:
        return cls(**_frozen(fields))

    def to_metadata(self) -> dict[str, str]:
        """Flat strings for ONNX `metadata_props`: texts as they are, everything else as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.to_dict().items()}

    @classmethod
    def from_metadata(cls, texts: Mapping[str, str]) -> InputSpec:
        """Raises UsageError if the texts were not written by `to_metadata`."""
        text = {"dataset", "fit", "name", "dtype"}
        try:
            said = {"native": "0", **texts}
            return cls.from_dict({k: said[k] if k in text else json.loads(said[k]) for k in cls.__dataclass_fields__})
        except (KeyError, ValueError, TypeError) as problem:
            raise UsageError(
                f"the ONNX file's metadata does not say how to prepare an image ({problem}); export it with prunectl"
            ) from problem


@dataclass(frozen=True)
class Provenance:
    """Where a network comes from: the run that trained it, what was pruned, and the sha256 of its saved weights."""

    run: str = ""
    pruning: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""


@dataclass(frozen=True)
class Artifact:
    """One exported file and what was measured on it. Accuracies and agreement are percent; None where not measured.

    precision: what the target computes in. engine_flags: what its engine build must be asked for besides. batch: None
    if free. params, kernel_params, macs: counted from the graph (`graph.Cost`). max_abs_diff, top1_agreement: against
    the network in torch."""

    file: str
    kind: Literal["onnx", "engine", "bundle"]
    profile: str
    precision: str
    sha256: str
    bytes: int
    opset: int
    ir: int
    batch: int | None
    params: int
    kernel_params: int
    macs: int
    input: InputSpec
    engine_flags: tuple[str, ...] = ()
    max_abs_diff: float | None = None
    top1_agreement: float | None = None
    accuracy: float | None = None
    provenance: Provenance = Provenance()

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Artifact:
        rest = {k: v for k, v in fields.items() if k not in ("schema", "input", "provenance", "engine_flags")}
        return cls(
            **rest,
            input=InputSpec.from_dict(fields["input"]),
            engine_flags=tuple(fields["engine_flags"]),
            provenance=Provenance(**fields["provenance"]),
        )


def record_path(model: Path) -> Path:
    """Where the JSON beside a model file is: `model.json` for `model.onnx`."""
    return model.with_suffix(".json")


def read_record(model: Path) -> Artifact:
    """The record beside a model file, whose sha256 it was compared with. Raises UsageError, CorruptFile."""
    path = record_path(model)
    if not model.is_file():
        raise UsageError(f"{model} is not a file; expected an exported model")
    try:
        record = Artifact.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; it is written beside {model.name} by an export") from None
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CorruptFile(f"{path} is not the record of an export ({problem}); export again") from problem
    if record.sha256 != sha256(model):
        raise CorruptFile(f"{model} is not the file that {path.name} describes (sha256 differs); export again")
    return record


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a UsageError that names `path`."""
    try:
        yield
    except OSError as problem:
        raise UsageError(f"{path} cannot be written ({problem.strerror or problem}); free space or choose another --out") from problem


@contextmanager
def drafted(model: Path) -> Iterator[Path]:
    """Where a model file and its record may be written and measured: they become those at `model` when the block ends well.

    Else nothing is left of them, and an earlier file stays. Raises UsageError if they cannot be written."""
    with writing(model):
        model.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in model.parent.glob(f".{glob.escape(model.stem)}.*{UNFINISHED}"):
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        folder = tempfile.TemporaryDirectory(dir=model.parent, prefix=f".{model.stem}.", suffix=UNFINISHED)
    with folder as name:
        draft = Path(name) / model.name
        yield draft
        with writing(model):
            record_path(draft).replace(record_path(model))  # first: a record beside an older file is noticed on reading
            draft.replace(model)


def write_record(model: Path, record: Artifact) -> None:
    """The JSON beside a model file. Raises UsageError if it cannot be written."""
    with writing(record_path(model)):
        write_json(record_path(model), record.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _frozen(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
