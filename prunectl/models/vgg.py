"""VGG for small images: Simonyan and Zisserman, ICLR 2015, in the BatchNorm form of network slimming (Liu et al., ICCV 2017)."""

from __future__ import annotations

from torch import nn

from prunectl.models.layers import conv, network, scaled
from prunectl.models.names import models

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a 2x2 max-pool between the groups


@models.register
def vgg16(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """VGG-16 with BatchNorm and a single linear layer, for images from 16 pixels."""
    stages: dict[str, nn.Module] = {}
    c_in = in_channels
    for i, group in enumerate(VGG16, start=1):
        if i > 1:
            stages[f"pool{i - 1}"] = nn.MaxPool2d(2)
        for j, channels in enumerate(group, start=1):
            c_out = scaled(channels, width)
            stages[f"conv{i}_{j}"] = conv(c_in, c_out, 3)
            stages[f"bn{i}_{j}"] = nn.BatchNorm2d(c_out)
            stages[f"relu{i}_{j}"] = nn.ReLU()
            c_in = c_out
    return network(stages, channels=c_in, num_classes=num_classes, gamma=0.5)
