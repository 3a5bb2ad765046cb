"""A network as two files that need no pickle and no training code: plan.json and model.safetensors.

The plan names the architecture, its factory arguments, and per pruning step the dropped channels of each group in the
numbering of the network before that step; replayed, it gives the same module, and the weights fit bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunectl import models
from prunectl.errors import CorruptFile, UnknownName, UsageError, VerificationFailed
from prunectl.files import sha256, write_json
from prunectl.pruning import cost
from prunectl.pruning.copying import copied
from prunectl.pruning.modes import evaluating
from prunectl.pruning.surgery import replay
from prunectl.training.checkpoint import read_tensors, write_tensors

PLAN, WEIGHTS = "plan.json", "model.safetensors"
ANSWERS = 16
ROUNDING = 2e-2  # of the largest logit: FP32 through another library differs by 1e-5, products in bfloat16 or TF32 by up to this


@dataclass(frozen=True)
class CompactModel:
    """A read compact-model folder; `module()` rebuilds the network."""

    path: Path
    plan: dict[str, Any]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        size = self.plan["model"]["image_size"]
        return self.plan["model"]["in_channels"], size, size

    def module(self) -> nn.Module:
        """The network in eval mode on the CPU. Raises CorruptFile when weights and plan do not belong together."""
        weights = self.path / WEIGHTS
        if not weights.is_file():
            raise CorruptFile(f"{self.path} has a {PLAN} but no {WEIGHTS}; write the model again")
        if sha256(weights) != self.plan["weights_sha256"]:
            raise CorruptFile(f"{weights} is damaged: its sha256 is not the one in {PLAN}; write the model again")
        plan, perhaps = self.path / PLAN, _perhaps(self.plan["model"])
        try:
            model = rebuild(self.plan["model"], self.plan["steps"])
        except (TypeError, ValueError, KeyError, UnknownName) as e:
            raise CorruptFile(f"{plan} describes no network ({type(e).__name__}: {e}); write the model again") from None
        except CorruptFile as e:
            raise CorruptFile(f"{plan}: {e}") from None
        try:
            model.load_state_dict(read_tensors(weights))
        except RuntimeError:
            raise CorruptFile(f"{weights} does not fit the network that {plan} describes{perhaps}") from None
        if (has := cost.parameters(model)) != self.plan["params"]:
            raise CorruptFile(f"{plan} says {self.plan['params']} parameters, and the network it describes has {has}{perhaps}")
        if then := self.plan.get("answer"):  # a plan of an earlier version has none
            try:
                same = _same(answer(model, self.input_shape), then)
            except Exception as e:  # noqa: BLE001 - whatever a network's code may raise
                raise CorruptFile(f"{plan}: the network it describes fails with {type(e).__name__}: {e}{perhaps}") from None
            if not same:
                raise CorruptFile(f"{plan}: the network it describes answers otherwise than the one that was saved{perhaps}")
        return model.eval()


def rebuild(arguments: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The architecture after its pruning steps, with fresh weights. Raises CorruptFile when the steps are another architecture's."""
    model = models.build(**arguments)
    try:
        return replay(model, [s["dropped"] for s in steps], example_input(arguments))
    except UsageError as e:
        raise CorruptFile(f"the pruning steps do not fit {arguments['name']}: {e}{_perhaps(arguments)}") from None


def answer(model: nn.Module, input_shape: tuple[int, int, int]) -> list[float] | None:
    """The first logits of `model` in eval mode for one image of waves: they tell two networks of the same shapes apart.

    None where it has no finite ones, or does not answer twice alike."""
    image = torch.arange(math.prod(input_shape), device="cpu").mul(0.7).sin().view(1, *input_shape)
    device = next((p.device for p in model.parameters()), image.device)
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        first, second = (model(image.to(device)).detach().flatten()[:ANSWERS].float().tolist() for _ in range(2))
    return first if all(map(math.isfinite, first)) and _same(first, second) else None


def _same(one: list[float] | None, other: list[float] | None) -> bool:
    """Within what other processors, libraries and number formats of a product round otherwise."""
    if one is None or other is None:
        return one is other
    largest = max(map(abs, other), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= ROUNDING * largest + 1e-9 for a, b in zip(one, other, strict=True))


def _perhaps(arguments: Mapping[str, Any]) -> str:
    file, colon, _ = arguments["name"].rpartition(":")
    return f"; {file} may have changed since: put it back as it was, or train anew" if colon else ""


def example_input(arguments: Mapping[str, Any]) -> Tensor:
    size = arguments["image_size"]
    return torch.zeros(1, arguments["in_channels"], size, size)


def write(
    folder: Path,
    model: nn.Module,
    *,
    arguments: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    parent: str,
    weights: Mapping[str, Tensor] | None = None,
) -> CompactModel:
    """Writes `model` (or `weights` in its place) and reads it back.

    Raises VerificationFailed when what comes back is not bit for bit the same network, or costs something else."""
    state = dict(weights) if weights is not None else model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, state)
    size = arguments["image_size"]
    shape = (arguments["in_channels"], size, size)
    counted = cost.count(model, shape)
    plan: dict[str, Any] = {
        "schema": 1,
        "model": dict(arguments),
        "steps": [dict(s) for s in steps],
        "data": dict(data),
        "params": counted.params,
        "macs": counted.macs,
        "parent": parent,
        "weights_sha256": sha256(folder / WEIGHTS),
    }
    write_json(folder / PLAN, plan)
    back = CompactModel(folder, plan).module()
    if cost.count(back, shape) != counted or any(not torch.equal(t, state[k].cpu()) for k, t in back.state_dict().items()):
        raise VerificationFailed(f"{folder}: the network rebuilt from its plan is not the one that was saved")
    trained = copied(model).cpu()
    trained.load_state_dict(state)
    plan["answer"] = answer(back, shape)
    if not _same(plan["answer"], answer(trained, shape)):
        raise VerificationFailed(f"{folder}: what was saved does not answer as what was trained{_perhaps(arguments)}")
    write_json(folder / PLAN, plan)
    return CompactModel(folder, plan)


def read(path: Path) -> CompactModel:
    """The compact model in folder `path`. Raises CorruptFile."""
    file = path / PLAN
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        for key in ("model", "steps", "data", "params", "macs", "parent", "weights_sha256"):
            plan[key]
        _ = plan["model"]["name"].rpartition, [float(logit) for logit in plan.get("answer") or ()]
        _ = plan["params"] + plan["macs"] + 0, plan["parent"] + "", "".join(plan["data"].get("classes") or ())
        for section, keys in (("model", ("name", "in_channels", "image_size")), ("data", ("name",))):
            for key in keys:
                plan[section][key]
    except FileNotFoundError:
        raise CorruptFile(f"{path} is no saved model: it has no {PLAN}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFile(f"{file} is damaged ({type(e).__name__}: {e}); write the model again") from None
    return CompactModel(path, plan)


def locate(path: Path) -> Path:
    """The compact-model folder meant by `path`: itself, a file in it, or a finished run folder's final network."""
    if not path.exists():
        raise UsageError(f"there is no run or saved network at {path}")
    if path.is_file() and path.name in (PLAN, WEIGHTS):
        return path.parent
    if path.is_file():
        if path.suffix == ".onnx":
            raise UsageError(f"{path} is an ONNX file already: check it with export --lint-only, time it with bench; expected a run")
        if path.suffix != ".json":
            read_tensors(path)  # says so when it is a pickle
        raise UsageError(f"{path} is no saved model: expected a run folder or a folder with {PLAN}")
    if (path / "recipe.yaml").is_file() and not (path / "result.json").is_file():
        raise UsageError(f"{path} is an unfinished run: go on with it by --resume, or name a network inside it")
    for candidate in (path, path / "compact", path / "model", path / "dense"):
        if (candidate / PLAN).is_file():
            return candidate
    raise UsageError(f"{path} holds no saved network: expected a finished run, or a folder with {PLAN}")


def load(path: str | Path) -> nn.Module:
    """The eval-mode network saved at `path` (a run, a compact-model folder, or a file in one), on the CPU."""
    return read(locate(Path(path))).module()
