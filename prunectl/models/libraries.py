"""torchvision's and timm's classifiers, never pretrained, for any number of input channels.

They stay as their library writes them: a ReLU may be a function, work in place, or be one module that runs several
times, which activation codes take in their stride because they watch calls, not modules. Parameter names are the
library's."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from prunectl.errors import UnknownName, UsageError
from prunectl.registry import canonical

RGB = 3
NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}  # without init_weights torchvision warns of its default


def torchvision_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's classifier `name`, its first convolution made for `in_channels`."""
    extra = NO_AUXILIARY_HEADS if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    if in_channels != RGB:
        _set_input_channels(model, in_channels)
    return model


def timm_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """timm's classifier `name`, which adapts to the input channels itself. Raises UsageError without timm, UnknownName."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError(f"model timm/{name} needs the timm library: pip install 'prunectl[timm]'") from error
    spellings = {canonical(known): known for known in timm.list_models()}
    if canonical(name) not in spellings:
        hint = "The tag after the dot names pretrained weights: leave it out." if "." in name else ""
        raise UnknownName("timm model", name.partition(".")[0], spellings.values(), hint)
    model: nn.Module = timm.create_model(spellings[canonical(name)], pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return model


def _set_input_channels(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution; the new weights keep the variance of its output.

    Every classifier of torchvision begins with a dense convolution of an RGB image, transformers included; a test walks them all."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert old.in_channels == RGB and old.groups == 1, name
    std = old.weight.std() * (RGB / in_channels) ** 0.5
    old.in_channels = in_channels
    old.weight = nn.Parameter(torch.empty(old.out_channels, in_channels, *old.kernel_size).normal_() * std)
