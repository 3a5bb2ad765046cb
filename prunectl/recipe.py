"""Every setting that decides a result, as one frozen record that reads from and writes to YAML.

Precedence: command line over recipe file over defaults. `resolve` merges the three; an unknown key or a bad value is an
error that names the key and the nearest known one. `digest` covers every field, so that two runs share a folder only
when they would do the same."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunectl.errors import CorruptFile, UsageError
from prunectl.registry import canonical
from prunectl.shipped import known_recipes, shipped


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any) -> Any:
        """pydantic would read true as 1."""
        for name, given in value.items() if isinstance(value, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(given, bool) and field and field.annotation is not bool and name != "round_to":  # which has words of its own
                raise ValueError(f"{name} = {str(given).lower()}: expected another value than true or false")
        return value


class Model(_Section):
    name: str
    width: float = Field(1.0, gt=0, le=16, description="multiplies the channels of the project's own networks")


class Data(_Section):
    name: str
    dir: str | None = Field(None, description="where data sets lie; null: $PRUNECTL_DATA, else ~/.cache/prunectl")
    image_size: int | None = Field(None, ge=8, le=1024, description="overrides the size the network is fed")
    train_images: int | None = Field(None, ge=1, description="a stratified part of the training images")
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of training images kept for validation; null: 0.1 (imagenet 0.02)"
    )
    augment: Literal["none", "flip", "crop", "crop-flip", "imagenet"] | None = Field(None, description="null: the data set's own default")
    final: Literal["test", "val"] = Field("test", description="images of the final accuracy; val while settings are being chosen")


class Train(_Section):
    epochs: int = Field(160, ge=0)
    batch_size: int = Field(128, ge=1)
    lr: float = Field(0.1, gt=0, le=1e30)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0, le=1e30)
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

    @model_validator(mode="after")
    def _nesterov_of_something(self) -> Train:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true with momentum = 0: there is no momentum to look ahead with, give one such as 0.9")
        return self


class Ticket(_Section):
    sparsity: float | None = Field(None, gt=0, lt=1, description="share to remove, of the channels that may go")
    target_macs: float | None = Field(None, gt=0, lt=1, description="share of dense MACs kept")
    target_params: float | None = Field(None, gt=0, lt=1, description="share of dense parameters kept")
    criterion: str = "obs"
    rho: float = Field(0.05, ge=0, description="weight of the bias term of the spline criterion")
    scope: Literal["layerwise", "global"] = "layerwise"
    pooling: Literal["raw", "mean", "macs"] = Field(
        "raw",
        description="global scope compares scores over their layer's mean (its default), as they are, or per MAC that a channel costs",
    )
    repair: Literal["none", "merge", "reconstruct"] = Field(
        "reconstruct", description="what stands in for removed channels: near-copies (merge), or a fitted mix of all that stay"
    )
    keep: str | None = Field(None, description="regular expression of layers that keep all channels")
    round_to: Literal["auto"] | int = "auto"
    weights: str = "inherit"
    detector: str = "spline"
    eps: float | None = Field(None, gt=0, description="null: the detector's own default")
    window: int | None = Field(None, ge=1, le=1_000_000, description="null: the detector's own default")
    latest: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the schedule after which the ticket is drawn, fires the detector or not: "
        "0.25 where that is spline with its own eps and window, else 1, never",
    )
    code: Literal["relu", "bn"] = "relu"
    probe: Literal["batch", "canvas"] = "batch"
    probe_images: int = Field(256, ge=2, description="of one alone, no unit can be both on and off")
    probes_per_epoch: int = Field(4, ge=1)
    recalibration_batches: int = Field(100, ge=0)
    draws: int = Field(1, ge=1, le=20, description="steps in which the ticket is drawn, each keeping the same share of what the last left")
    draw_every: float = Field(1.0, gt=0, description="epochs from one draw to the next")
    rewarm_epochs: float = Field(0.0, ge=0, description="after a draw the learning rate climbs back to the schedule's over so many epochs")
    search_only: bool = False

    @field_validator("criterion", "detector")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        return canonical(value)

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = [k for k in ("sparsity", "target_macs", "target_params") if value.get(k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of sparsity, target_macs and target_params, not {' and '.join(given)}")
        return {**value, **({} if given else {"sparsity": 0.5})}

    @model_validator(mode="before")
    @classmethod
    def _pooled_by_scope(cls, value: Any) -> Any:
        """Layers are compared over their mean score, unless something else is asked for."""
        return {"pooling": "mean", **value} if isinstance(value, Mapping) and value.get("scope") == "global" else value

    @model_validator(mode="before")
    @classmethod
    def _in_time(cls, value: Any) -> Any:
        """Who names another detector or a threshold gets its word alone; who names neither gets a ticket early."""
        if not isinstance(value, Mapping) or value.get("latest") is not None:
            return value
        own = canonical(str(value.get("detector", "spline"))) == "spline" and value.get("eps") is None and value.get("window") is None
        return {**value, "latest": 0.25 if own else 1.0}

    @model_validator(mode="after")
    def _several_draws(self) -> Ticket:
        if self.draws > 1 and (self.weights != "inherit" or self.search_only):
            other = "search_only" if self.search_only else f"weights = {self.weights}"
            raise ValueError(f"draws = {self.draws} with {other}: several draws train on in between, with the weights they have")
        return self

    @model_validator(mode="after")
    def _merged(self) -> Ticket:
        if self.repair == "merge" and self.weights != "inherit":
            raise ValueError(f"repair = merge with weights = {self.weights}: there are no weights of removed channels to give to others")
        return self

    @model_validator(mode="after")
    def _pooled(self) -> Ticket:
        if self.pooling != "raw" and self.scope != "global":
            raise ValueError(f"pooling = {self.pooling} with scope = layerwise: scores are compared over layers with scope = global only")
        return self

    @property
    def last_fixed_draw(self) -> float | None:
        """Epochs after which the last ticket is drawn, where `detector` is epoch:N; the others decide as they go."""
        name, _, at = self.detector.partition(":")
        return float(at) + (self.draws - 1) * self.draw_every if name == "epoch" and _is_number(at) else None

    @field_validator("round_to", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError("must be auto or a positive number of channels, e.g. 8")
        return value

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: str) -> str:
        if value not in ("inherit", "reinit") and not (value.startswith("rewind:") and value[7:].isdigit()):
            raise ValueError("must be inherit, reinit or rewind:E with an epoch E, e.g. rewind:0")
        return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


FADE = 80.0  # chosen on validation data, docs/LOG.md


class Sfw(_Section):
    constraint: str = "nm"
    k_fraction: float | None = Field(None, description="share of a tensor's entries, or filters, in a vertex; null: the set's own default")
    tau: float = Field(15.0, gt=0, le=1e6, description="diameter of every set in units of twice the tensor's norm at the start")
    n: int | None = Field(None, ge=1, description="of N:M; null: 2, and no N:M row but for constraint nm")
    m: int | None = Field(None, ge=2, le=127, description="of N:M; null: 4, and no N:M row but for constraint nm")
    p: float | Literal["inf"] = Field(2.0, description="of constraint lp")
    rescale: Literal["gradient", "diameter", "none"] = "gradient"
    sfw_init: bool = False
    fade: float | None = Field(
        None, ge=0, description="how much weights that a swept ratio would remove shrink in training; null: 80, and 0 without a constraint"
    )
    sparsity: tuple[float, ...] = (*(i / 10 for i in range(1, 10)), *(i / 100 for i in range(91, 100)))
    scope: Literal["weights", "all"] = Field("weights", description="what is ranked: weights, or every parameter as published")
    pooling: Literal["global", "layerwise"] = Field("global", description="one ranking over all tensors, or one for each")
    bn_recal: int = Field(100, ge=0, description="batches of 100 training images that batch norm is re-estimated on")
    dynamic_lr: bool = Field(
        True, description="the published x0.7 / x1.06 rule; off below 60 epochs and under another schedule than multistep"
    )
    channels: tuple[float, ...] = Field((0.25, 0.5, 0.75), description="shares of channels removed for good after group-k-support")

    @field_validator("constraint")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        return canonical(value)

    @field_validator("k_fraction")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError("must be in (0, 1], e.g. 0.05")
        return value

    @field_validator("p", mode="before")
    @classmethod
    def _norm(cls, value: Any) -> Any:
        value = "inf" if value == math.inf else value
        if value != "inf" and not (isinstance(value, int | float) and value >= 1):
            raise ValueError("must be a number of at least 1, or inf")
        return value

    @field_validator("sparsity", "channels", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) else value

    @field_validator("sparsity", "channels")
    @classmethod
    def _ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < s < 1 for s in value):
            raise ValueError("must be shares between 0 and 1, both excluded, e.g. 0.9")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _n_of_m(self) -> Sfw:
        n, m = self.n_of_m
        if n >= m:
            raise ValueError(f"n = {n} of m = {m}: n must be smaller than m, e.g. 2 of 4")
        return self

    @property
    def fading(self) -> float:
        """The shares that a weight below every threshold loses, summed over the schedule as if at full rate and strength."""
        return self.fade if self.fade is not None else 0.0 if self.constraint == "none" else FADE

    @property
    def n_of_m(self) -> tuple[int, int]:
        return self.n or 2, self.m or 4

    @property
    def wants_pattern(self) -> bool:
        """Whether the accuracy at N:M is asked for."""
        return self.constraint == "nm" or self.n is not None or self.m is not None


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

    @model_validator(mode="after")
    def _schedule_holds_the_search(self) -> Recipe:
        if self.verb == "find-ticket" and self.train.epochs == 0:
            raise ValueError("train.epochs = 0: a search needs training, give at least 1 epoch")
        rewind = self.ticket.weights.removeprefix("rewind:") if self.ticket else ""
        if rewind.isdigit() and int(rewind) >= self.train.epochs:
            raise ValueError(f"ticket.weights = rewind:{rewind}: the schedule has {self.train.epochs} epochs, rewind to an earlier one")
        last = self.ticket.last_fixed_draw if self.ticket and self.verb == "find-ticket" else None
        trained_on = self.ticket is None or not self.ticket.search_only
        if last is not None and (last > self.train.epochs or (last == self.train.epochs and trained_on)):
            raise ValueError(f"the last draw is due after {last:g} epochs and the schedule has {self.train.epochs}: draw earlier")
        if self.ticket and self.start and self.ticket.weights == "rewind:0":
            raise ValueError("ticket.weights = rewind:0 with a start: there is no initial network to go back to, take inherit or reinit")
        return self

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        return f"{self.verb}-{_slug(self.model.name)}-{_slug(self.data.name)}-{self.digest}"


# What a step of each kind wants. Frank-Wolfe: Lu et al., ICLR 2022, whose averaged momentum makes a rate of 1 what 0.1 is to SGD.
_FRANK_WOLFE = {"lr": 1.0, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "schedule": "multistep", "milestones": [1 / 3, 2 / 3]}
_SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "schedule": "cosine", "milestones": [0.5, 0.75]}

BUDGETS = ("ticket.sparsity", "ticket.target_macs", "ticket.target_params")
NAMED = ("verb", "model.name", "data.name")
SECTION_OF = {"find-ticket": "ticket", "sfw-prune": "sfw"}
READ_BY = {"find-ticket": ("ticket.", "train.distill"), "sfw-prune": ("sfw.",)}


def resolve(
    verb: str, *, model: str, dataset: str, file: Path | None = None, overrides: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> Recipe:
    """The recipe of `verb model dataset`: shipped or given file, then `overrides` ("train.epochs" -> 5), then `sets`.

    Raises UsageError, naming the key, what came and what was expected."""
    file_of_model, colon, function = model.rpartition(":")
    # a user's file is found again from any folder, and is not another project's of that name
    name = f"{Path(file_of_model).expanduser().resolve()}:{function}" if colon else canonical(model)
    default = shipped("recipes") / verb / f"{_slug(name)}-{_slug(dataset)}.yaml"
    named = os.sep not in model + dataset  # a folder or another library's network is none of the same last name
    settings = _read(file) if file else (_read(default) if named and default.is_file() else {})
    for section in SECTION_OF.values():
        if section != SECTION_OF.get(verb):
            settings.pop(section, None)  # of another verb's recipe
    if verb != "find-ticket" and "distill" in _section(settings, "train"):
        settings["train"] = {k: v for k, v in settings["train"].items() if k != "distill"}  # as well
    settings = {**settings, "verb": verb, "model": {**_section(settings, "model"), "name": name}}
    settings["data"] = {**_section(settings, "data"), "name": dataset}
    if verb in SECTION_OF:
        settings[SECTION_OF[verb]] = _section(settings, SECTION_OF[verb])
    given = _together(overrides or {}, sets)
    for key in given:
        reader = next((v for v, section in READ_BY.items() if key.startswith(section) and v != verb), None)
        if reader:
            raise UsageError(f"{key} is read by {reader} only, and this is {verb}: leave it out")
    if any(key in BUDGETS for key in given):  # a budget on the command line replaces the file's, whichever it was
        settings["ticket"] = _without_budget(_section(settings, "ticket"))
    if verb == "sfw-prune":
        settings["train"] = _training_for_the_set(settings, given)
    for key, value in given.items():
        _put(settings, key, value)
    if settings["data"].get("dir"):
        settings["data"]["dir"] = str(Path(str(settings["data"]["dir"])).expanduser().resolve())  # one folder, one run, from anywhere
    if settings.get("start"):
        settings["start"] = str(Path(str(settings["start"])).expanduser().resolve())  # what runs/latest is today
    return validated(settings)


def merged(file: Path | None, overrides: Mapping[str, Any], sets: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a file, then `overrides` ("bench.repeats" -> 3), then `sets`, in one tree that nobody has checked yet.

    Raises UsageError for what cannot be read."""
    settings = _read(file) if file else {}
    for key, value in _together(overrides, sets).items():
        _put(settings, key, value)
    return settings


def _training_for_the_set(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The train section of sfw-prune with its defaults; without a constraint they are those of its rival, SGD.

    A rate for one kind of step is wrong for the other: where the command line turns a recipe from Frank-Wolfe to SGD or
    back, the recipe's own step settings go."""
    in_file = _section(settings, "sfw").get("constraint", "")
    by_sgd, was_by_sgd = (canonical(str(kind)) == "none" for kind in (given.get("sfw.constraint", in_file), in_file))
    own = {k: v for k, v in _section(settings, "train").items() if by_sgd == was_by_sgd or k not in _SGD}
    return {"epochs": 180, "batch_size": 128, **(_SGD if by_sgd else _FRANK_WOLFE), **own}


def validated(settings: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(settings)
    except ValidationError as e:
        raise UsageError(_sentence(e.errors()[0])) from None


def read_back(path: Path) -> Recipe:
    """The recipe that a run folder keeps. Raises CorruptFile."""
    try:
        return validated(_read(path))
    except UsageError as e:
        raise CorruptFile(f"{path} is damaged: {e}") from None


class _OncePerKey(yaml.SafeLoader):
    """Of a key that comes twice YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} comes twice{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"recipe {path} cannot be read: {e.strerror or e}; `prunectl list recipes` names the shipped ones") from None
    except UnicodeDecodeError:
        raise UsageError(f"recipe {path} is not a text file") from None
    try:
        settings = yaml.load(text, Loader=_OncePerKey) or {}
    except yaml.YAMLError as e:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {path}: expected sections such as train: and ticket:, got a {type(settings).__name__}")
    settings = {key: value for key, value in settings.items() if value is not None}  # an empty section is none
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UsageError(f"recipe {path}: extends = {base!r}: expected the name of a shipped recipe, e.g. train/resnet8-fashion-mini")
    if base not in known_recipes():
        raise UsageError(f"recipe {path}: extends = {base}: no shipped recipe; `prunectl list recipes` names them")
    below = _read(shipped("recipes") / f"{base}.yaml")
    if any(f"ticket.{key}" in BUDGETS for key in _section(settings, "ticket")):  # as a budget on the command line does
        below["ticket"] = _without_budget(_section(below, "ticket"))
    return _merged(below, settings)


def _without_budget(ticket: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in ticket.items() if f"ticket.{key}" not in BUDGETS}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}}


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise UsageError(f"recipe {name} = {value!r}: expected a section of keys, as in {name}: {{key: value}}")
    return dict(value)


def _together(options: Mapping[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """Settings of options and of --set. Raises UsageError where the two contradict each other."""
    settled = dict(_assignment(text) for text in sets)
    for key in options.keys() & settled.keys():
        if _spelled(options[key]) != _spelled(settled[key]):
            raise UsageError(f"{key} is given twice, {options[key]} by its option and {settled[key]} by --set: leave one out")
    given = {**options, **settled}
    return {key: given[key] for key in sorted(given, key=lambda k: k.count("."))}  # a section first, then what is set in it


def _spelled(value: Any) -> Any:
    """One spelling of what means the same: 1e-3 and 0.001, bn_scale and bn-scale, 0.9 and [0.9]."""
    if isinstance(value, list | tuple):
        return _spelled(value[0]) if len(value) == 1 else [_spelled(v) for v in value]
    text = str(value)
    return float(text) if _is_number(text) else canonical(text)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise UsageError(f"--set {text}: expected key.path=value, e.g. --set train.lr=0.05")
    if key in NAMED:
        raise UsageError(f"--set {text}: {key} is said by the command itself, prunectl VERB MODEL DATASET")
    return key, _scalar(text, value)


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
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
    if error["type"] in ("model_type", "model_attributes_type"):
        message = f"expected a section of keys, as in {path[-1]}: {{key: value}}"
    shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
    return f"recipe {key}{shown}: {message}" if key else f"recipe {message}"


def _section_type(section: Any, part: str) -> Any:
    annotation = section.model_fields[part].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))


def _slug(name: str) -> str:
    """A name as part of a file name: the last path component, letters, digits, dots and dashes."""
    last = name.rstrip("/").rsplit("/", 1)[-1].replace(".py:", "-")
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in last).strip("-.") or "unnamed"
