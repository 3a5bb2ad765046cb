"""MobileNetV2: Sandler et al., CVPR 2018.

Differs: ReLU where the paper clips at 6, so that each unit has one hyperplane; no dropout before the classifier. Images
up to 64 pixels enter with stride 1 in the stem and in the second stage, the usual form for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from prunectl.models.layers import SMALL_IMAGE, conv, network, scaled
from prunectl.models.names import models

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2 of the paper: expansion, channels, blocks, stride of the first block."""


def _conv_bn(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> dict[str, nn.Module]:
    return {"conv": conv(c_in, c_out, kernel, stride=stride, groups=groups), "bn": nn.BatchNorm2d(c_out)}


def _conv_bn_relu(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> dict[str, nn.Module]:
    return {**_conv_bn(c_in, c_out, kernel, stride=stride, groups=groups), "relu": nn.ReLU()}


class InvertedResidual(nn.Module):
    """1x1 expansion (none if there is nothing to expand), 3x3 depthwise, linear 1x1 projection."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, *, stride: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(OrderedDict({} if c_mid == c_in else _conv_bn_relu(c_in, c_mid, 1)))
        self.depthwise = nn.Sequential(OrderedDict(_conv_bn_relu(c_mid, c_mid, 3, stride=stride, groups=c_mid)))
        self.project = nn.Sequential(OrderedDict(_conv_bn(c_mid, c_out, 1)))
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.is_residual else out


@models.register
def mobilenet_v2(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """MobileNetV2 with ReLU; stride-1 stem and second stage for images up to 64 pixels."""
    small = image_size <= SMALL_IMAGE
    c_in, c_last = scaled(32, width), scaled(1280, max(1.0, width))
    stages: dict[str, nn.Module] = {
        "conv1": conv(in_channels, c_in, 3, stride=1 if small else 2),
        "bn1": nn.BatchNorm2d(c_in),
        "relu1": nn.ReLU(),
    }
    for i, (expansion, channels, depth, stage_stride) in enumerate(STAGES, start=1):
        blocks = []
        for j in range(depth):
            c_out = scaled(channels, width)
            stride = stage_stride if j == 0 and not (small and i == 2) else 1
            blocks.append(InvertedResidual(c_in, c_in * expansion, c_out, stride=stride))
            c_in = c_out
        stages[f"layer{i}"] = nn.Sequential(*blocks)
    stages |= {"conv2": conv(c_in, c_last, 1), "bn2": nn.BatchNorm2d(c_last), "relu2": nn.ReLU()}
    return network(stages, channels=c_last, num_classes=num_classes)
