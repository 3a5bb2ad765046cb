"""Every setting that decides a result, as one frozen record that reads from and writes to YAML.

Precedence: command line over recipe file over defaults. `resolve` merges the three; an unknown key or a bad value is an
error that names the key and the nearest known one. `digest` covers every field, so that two runs share a folder only
when they would do the same."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunectl.errors import UsageError

PACKAGE = Path(__file__).parent
Fraction = Field(gt=0, lt=1)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Model(_Section):
    name: str
    width: float = Field(1.0, gt=0, le=16, description="multiplies the channels of the project's own networks")


class Data(_Section):
    name: str
    image_size: int | None = Field(None, ge=8, le=1024, description="overrides the size the network is fed")
    train_images: int | None = Field(None, ge=1, description="a stratified part of the training images")
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of training images kept for validation; null: 0.1 (imagenet 0.02)"
    )
    augment: Literal["none", "crop", "crop-flip", "imagenet"] | None = Field(None, description="null: the data set's own default")


class Train(_Section):
    epochs: int = Field(160, ge=0)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="shares of the schedule at which lr is divided by 10")
    warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    l1_gammas: float = Field(0.0, ge=0, description="L1 penalty on batch-norm scales (network slimming)")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an average of the weights; evaluated instead of them")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    distill: float = Field(0.0, ge=0, le=1, description="weight of the dense network's soft answers after a ticket is drawn")

    @field_validator("milestones")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value) or any(not 0 < m < 1 for m in value):
            raise ValueError("must be increasing shares of the schedule between 0 and 1, e.g. [0.5, 0.75]")
        return value


class Ticket(_Section):
    sparsity: float | None = Field(None, gt=0, lt=1, description="share of channels removed")
    target_macs: float | None = Field(None, gt=0, lt=1, description="share of dense MACs kept")
    target_params: float | None = Field(None, gt=0, lt=1, description="share of dense parameters kept")
    criterion: str = "spline"
    rho: float = Field(0.05, ge=0, description="weight of the bias term of the spline criterion")
    scope: Literal["layerwise", "global"] = "layerwise"
    repair: Literal["none", "merge", "reconstruct"] = Field(
        "reconstruct", description="what stands in for removed channels: near-copies (merge), or a fitted mix of all that stay"
    )
    keep: str | None = Field(None, description="regular expression of layers that keep all channels")
    round_to: Literal["auto"] | int = "auto"
    weights: str = "inherit"
    detector: str = "spline"
    eps: float | None = Field(None, gt=0, description="null: the detector's own default")
    window: int | None = Field(None, ge=1, description="null: the detector's own default")
    code: Literal["relu", "bn"] = "relu"
    probe: Literal["batch", "canvas"] = "batch"
    probe_images: int = Field(256, ge=1)
    probes_per_epoch: int = Field(4, ge=1)
    recalibration_batches: int = Field(100, ge=0)
    search_only: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = [k for k in ("sparsity", "target_macs", "target_params") if value.get(k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of sparsity, target_macs and target_params, not {' and '.join(given)}")
        return {**value, **({} if given else {"sparsity": 0.5})}

    @field_validator("round_to")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if value != "auto" and int(value) < 1:
            raise ValueError("must be auto or a positive number of channels, e.g. 8")
        return value

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: str) -> str:
        if value not in ("inherit", "reinit") and not (value.startswith("rewind:") and value[7:].isdigit()):
            raise ValueError("must be inherit, reinit or rewind:E with an epoch E, e.g. rewind:0")
        return value


class Sfw(_Section):
    constraint: str = "k-sparse"
    k_fraction: float = Field(0.05, gt=0, le=1)
    tau: float = Field(15.0, gt=0, description="diameter of every set in units of twice the tensor's norm at the start")
    n: int = Field(2, ge=1)
    m: int = Field(4, ge=2)
    p: float = Field(2.0, ge=1)
    rescale: Literal["gradient", "diameter", "none"] = "gradient"
    sfw_init: bool = False
    sparsity: tuple[float, ...] = (*(i / 10 for i in range(1, 10)), *(i / 100 for i in range(91, 100)))
    scope: Literal["weights", "all"] = "weights"
    pooling: Literal["global", "layerwise"] = "global"
    bn_recal: int = Field(100, ge=0)
    dynamic_lr: bool = True

    @field_validator("sparsity")
    @classmethod
    def _ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 < s < 1 for s in value):
            raise ValueError("must be shares between 0 and 1, both excluded, e.g. 0.9")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _pattern(self) -> Sfw:
        if self.n >= self.m:
            raise ValueError(f"n = {self.n} of m = {self.m}: n must be smaller than m, e.g. 2 of 4")
        return self


class Recipe(_Section):
    verb: Literal["train", "find-ticket", "sfw-prune"]
    seed: int = Field(0, ge=0, lt=2**31)
    model: Model
    data: Data
    train: Train = Train()
    ticket: Ticket | None = None
    sfw: Sfw | None = None
    start: str | None = Field(None, description="a run or a compact model to start from")

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=False)

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        return f"{self.verb}-{_slug(self.model.name)}-{_slug(self.data.name)}-{self.digest}"


BUDGETS = ("ticket.sparsity", "ticket.target_macs", "ticket.target_params")
SECTION_OF = {"find-ticket": "ticket", "sfw-prune": "sfw"}


def shipped(folder: str) -> Path:
    """Data that comes with the package: `recipes` or `deploy`, in a checkout or in an installed wheel."""
    packed = PACKAGE / "_shipped" / folder
    return packed if packed.is_dir() else PACKAGE.parent / folder


def resolve(
    verb: str, *, model: str, dataset: str, file: Path | None = None, overrides: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> Recipe:
    """The recipe of `verb model dataset`: shipped or given file, then `overrides` ("train.epochs" -> 5), then `sets`.

    Raises UsageError, naming the key, what came and what was expected."""
    from prunectl.registry import canonical

    name = model if ":" in model else canonical(model)
    default = shipped("recipes") / verb / f"{_slug(name)}-{_slug(dataset)}.yaml"
    settings = _read(file) if file else (_read(default) if default.is_file() else {})
    settings = {**settings, "verb": verb, "model": {"name": name, **_without_name(settings, "model")}}
    settings["data"] = {"name": dataset, **_without_name(settings, "data")}
    if verb in SECTION_OF:
        settings.setdefault(SECTION_OF[verb], {})
    if any(key in BUDGETS for key in overrides or {}):  # a budget on the command line replaces the file's, whichever it was
        for key in BUDGETS:
            settings["ticket"].pop(key.removeprefix("ticket."), None)
    for key, value in (overrides or {}).items():
        _put(settings, key, value)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text}: expected key.path=value, e.g. --set train.lr=0.05")
        _put(settings, key.strip(), _scalar(text, value))
    return validated(settings)


def validated(settings: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(settings)
    except ValidationError as e:
        raise UsageError(_sentence(e.errors()[0])) from None


def read_back(path: Path) -> Recipe:
    """The recipe that a run folder keeps."""
    return validated(_read(path))


def known_recipes() -> dict[str, str]:
    """Shipped recipes by name, with the first comment line of each."""
    root = shipped("recipes")
    found = {}
    for path in sorted(root.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[str(path.relative_to(root).with_suffix(""))] = first.lstrip("# ").strip()
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"recipe {path} cannot be read: {e.strerror or e}; `prunectl list recipes` names the shipped ones") from None
    except UnicodeDecodeError:
        raise UsageError(f"recipe {path} is not a text file") from None
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {path}: expected sections such as train: and ticket:, got a {type(settings).__name__}")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    return _merged(_read(shipped("recipes") / f"{base}.yaml"), settings)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}}


def _without_name(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    value = settings.get(section, {})
    if not isinstance(value, dict):
        raise UsageError(f"recipe {section} = {value!r}: expected a section of keys, e.g. {section}: {{width: 1.0}}")
    return {k: v for k, v in value.items() if k != "name"}


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.replace("-", "_").split(".")
    here = settings
    for part in path:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise UsageError(f"--set {key}: '{part}' is a value, not a section")
    here[last] = value


def _scalar(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {text}: the value is not readable; quote it") from None


def _sentence(error: Mapping[str, Any]) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = _section_type(section, part)
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        return f"unknown recipe key '{key}': " + (
            f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known: {', '.join(known)}."
        )
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    value = error.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
    return f"recipe {key}{shown}: {message}"


def _section_type(section: Any, part: str) -> Any:
    annotation = section.model_fields[part].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))


def _slug(name: str) -> str:
    """A name as part of a file name: the last path component, letters, digits, dots and dashes."""
    last = name.rstrip("/").rsplit("/", 1)[-1].replace(".py:", "-")
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in last).strip("-.") or "unnamed"
