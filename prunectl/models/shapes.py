"""Networks on the meta device: shapes and counts without memory or initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prunectl.models.factory import build


class _WeightsOnMeta(TorchFunctionMode):
    """Layers allocate their weights with torch.empty. Other tensors stay real: RegNet computes its widths with them."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"} if func is torch.empty else kwargs)


def build_without_weights(name: str, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """`build(...)` on the meta device, in milliseconds."""
    with _WeightsOnMeta():
        model = build(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)
    return model.to("meta")
