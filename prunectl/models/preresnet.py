"""Pre-activation bottleneck networks for small images: He et al., ECCV 2016, as pruned by network slimming and early-bird.

Liu et al., ICCV 2017; You et al., ICLR 2020. BatchNorm weights start at 0.5 as in their code. Differs: no channel
selection before the first convolution of a block (a gather in the graph); channels are removed physically instead."""

from __future__ import annotations

from torch import Tensor, nn

from prunectl.models.layers import conv, network, scaled
from prunectl.models.names import models


class PreActBottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, c_mid: int, *, stride: int) -> None:
        super().__init__()
        c_out = c_mid * self.expansion
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(c_in, c_mid, 1)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(c_mid, c_mid, 3, stride=stride)
        self.bn3 = nn.BatchNorm2d(c_mid)
        self.relu3 = nn.ReLU()
        self.conv3 = conv(c_mid, c_out, 1)
        self.downsample = None if c_in == c_out and stride == 1 else conv(c_in, c_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.relu1(self.bn1(x)))
        out = self.conv2(self.relu2(self.bn2(out)))
        out = self.conv3(self.relu3(self.bn3(out)))
        return out + (x if self.downsample is None else self.downsample(x))


def preresnet(depth: int, *, num_classes: int, in_channels: int, width: float) -> nn.Sequential:
    """9n+2 layers: three stages of n bottlenecks with 16, 32 and 64 inner and four times as many outer channels."""
    c_in = scaled(16, width)
    stages: dict[str, nn.Module] = {"conv1": conv(in_channels, c_in, 3)}
    for i, channels in enumerate((16, 32, 64)):
        blocks = []
        for j in range((depth - 2) // 9):
            c_mid = scaled(channels, width)
            blocks.append(PreActBottleneck(c_in, c_mid, stride=2 if i > 0 and j == 0 else 1))
            c_in = c_mid * PreActBottleneck.expansion
        stages[f"layer{i + 1}"] = nn.Sequential(*blocks)
    stages |= {"bn": nn.BatchNorm2d(c_in), "relu": nn.ReLU()}
    return network(stages, channels=c_in, num_classes=num_classes, gamma=0.5)


@models.register
def preresnet_20(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Pre-activation ResNet-20 of bottleneck blocks, for small images."""
    return preresnet(20, num_classes=num_classes, in_channels=in_channels, width=width)


@models.register
def preresnet_56(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Pre-activation ResNet-56 of bottleneck blocks, for small images."""
    return preresnet(56, num_classes=num_classes, in_channels=in_channels, width=width)


@models.register
def preresnet_101(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Pre-activation ResNet-101 of bottleneck blocks, for small images: the spline early-bird paper's."""
    return preresnet(101, num_classes=num_classes, in_channels=in_channels, width=width)
