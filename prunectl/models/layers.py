"""The pieces that our own models share. Every convolution has a BatchNorm after or before it, and no bias."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

SMALL_IMAGE = 64  # pixels; up to here ImageNet models keep the resolution that their stem would throw away


def scaled(channels: int, width: float) -> int:
    """channels * width to the nearest multiple of 8, at least 8 and never more than 10 % below.

    Sandler et al., CVPR 2018 (the rule of the published MobileNetV2 code)."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def conv(c_in: int, c_out: int, kernel: int, *, stride: int = 1, padding: int | None = None, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding, groups=groups, bias=False)


def network(stages: dict[str, nn.Module], *, channels: int, num_classes: int, gamma: float = 1.0) -> nn.Sequential:
    """`stages`, which end with `channels` maps of any size, then pool, flatten and classifier; initialised.

    Convolutions: He et al., ICCV 2015, fan-out. BatchNorm: weight `gamma`, bias 0. Linear: torch's default."""
    head = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, num_classes)}
    model = nn.Sequential(OrderedDict({**stages, **head}))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gamma)
    return model
