"""Optimizers by parameter name: how they are made, stored without pickle, and follow a surgery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

_SHARED = "*"  # marks state of the optimizer as a whole; no parameter's name begins with it


def sgd(model: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """State by "<parameter name>/<key>", and what an optimizer keeps under a name of its own (counters) by "*<name>/<key>"."""
    shared = {f"{_SHARED}{owner}": values for owner, values in optimizer.state.items() if isinstance(owner, str)}
    tensors = {f"{owner}/{key}": value.detach() for owner, values in shared.items() for key, value in values.items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach()
    return tensors


def load_state_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave, on each parameter's device and layout."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        if name.startswith(_SHARED):
            kept = cast(dict[str, dict[str, Any]], optimizer.state)[name.removeprefix(_SHARED)]
            kept[key] = value.to(kept[key].device)
            continue
        p = parameters[name]
        same = value.shape == p.shape  # momentum lies in memory as its parameter does
        optimizer.state[p][key] = torch.empty_like(p, dtype=value.dtype).copy_(value) if same else value.to(p.device, copy=True)


def momentum_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Momentum by parameter name, for what has one."""
    found = {}
    for name, p in model.named_parameters():
        value = optimizer.state.get(p, {}).get("momentum_buffer")
        if value is not None:
            found[name] = value
    return found


def set_momentum(model: nn.Module, optimizer: Optimizer, momentum: Mapping[str, Tensor]) -> None:
    load_state_tensors(model, optimizer, {f"{name}/momentum_buffer": t for name, t in momentum.items()})
