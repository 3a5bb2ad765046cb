"""From a model's name to a freshly initialised network. The weights depend on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from prunectl.errors import UsageError
from prunectl.models.names import ModelName, models, resolve

if TYPE_CHECKING:
    from torch import nn


def build(name: str, *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0, seed: int = 0) -> nn.Module:
    """The network `name` for (N, in_channels, image_size, image_size) inputs and (N, num_classes) logits, in training mode.

    `width` scales the channels of our own models. The same arguments give the same bits on every call, and torch's
    global generators are left as they were. Raises UsageError for values that cannot be used, UnknownName."""
    import torch

    for key, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if value < 1:
            raise UsageError(f"model {name}: {key} = {value}: must be at least 1")
    if not (math.isfinite(width) and width > 0):
        raise UsageError(f"model.width = {width}: must be a positive number, e.g. 0.5")
    model = resolve(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return _build(model, num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


def _build(model: ModelName, *, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    if model.source == "prunectl":
        make: Callable[..., nn.Module] = models.get(model.name)
        return make(num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)
    if model.source == "file":
        from prunectl.models import userfile

        arguments = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "width": width}
        return userfile.build(model.name, arguments)
    from prunectl.models import libraries

    if width != 1:
        raise UsageError(f"model.width = {width:g} with {model}: width scales prunectl's own models; leave it at 1")
    library = libraries.torchvision_model if model.source == "torchvision" else libraries.timm_model
    return library(model.name, num_classes=num_classes, in_channels=in_channels)
