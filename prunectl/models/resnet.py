"""Post-activation residual networks: He et al., CVPR 2016.

state_dict names and order are torchvision's, so its ImageNet weights load where the stem is the standard one."""

from __future__ import annotations

from torch import Tensor, nn

from prunectl.models.layers import SMALL_IMAGE, conv, network, scaled
from prunectl.models.names import models


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, c_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.relu2(out + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """The stride sits in the 3x3 convolution ("v1.5"), as in torchvision."""

    expansion = 4

    def __init__(self, c_in: int, c_mid: int, *, stride: int) -> None:
        super().__init__()
        c_out = c_mid * self.expansion
        self.conv1 = conv(c_in, c_mid, 1)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(c_mid, c_mid, 3, stride=stride)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(c_mid, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.relu3(out + (x if self.downsample is None else self.downsample(x)))
        return out


def _projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    if c_in == c_out and stride == 1:
        return None
    return nn.Sequential(conv(c_in, c_out, 1, stride=stride), nn.BatchNorm2d(c_out))


def _small_stem(in_channels: int, channels: int) -> dict[str, nn.Module]:
    return {"conv1": conv(in_channels, channels, 3), "bn1": nn.BatchNorm2d(channels), "relu": nn.ReLU()}


def _imagenet_stem(in_channels: int, channels: int) -> dict[str, nn.Module]:
    return {
        "conv1": conv(in_channels, channels, 7, stride=2),
        "bn1": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }


def _resnet(
    stem: dict[str, nn.Module], block: type[BasicBlock] | type[Bottleneck], *, depths: list[int], widths: list[int], num_classes: int
) -> nn.Sequential:
    """`depths[i]` blocks of `widths[i]` channels in stage i; each stage but the first halves the resolution."""
    stages, c_in = dict(stem), widths[0]
    for i, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
        blocks = []
        for j in range(depth):
            blocks.append(block(c_in, channels, stride=2 if i > 0 and j == 0 else 1))
            c_in = channels * block.expansion
        stages[f"layer{i + 1}"] = nn.Sequential(*blocks)
    return network(stages, channels=c_in, num_classes=num_classes)


def _cifar_resnet(depth: int, *, num_classes: int, in_channels: int, width: float) -> nn.Sequential:
    """Sec. 4.2 of the paper, 6n+2 layers; 1x1 projections ("option B") where the paper pads the shortcut with zeros."""
    widths = [scaled(c, width) for c in (16, 32, 64)]
    stem = _small_stem(in_channels, widths[0])
    return _resnet(stem, BasicBlock, depths=[(depth - 2) // 6] * 3, widths=widths, num_classes=num_classes)


def _imagenet_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: list[int],
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float,
) -> nn.Sequential:
    widths = [scaled(c, width) for c in (64, 128, 256, 512)]
    stem = _small_stem if image_size <= SMALL_IMAGE else _imagenet_stem
    return _resnet(stem(in_channels, widths[0]), block, depths=depths, widths=widths, num_classes=num_classes)


@models.register
def resnet8(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """CIFAR ResNet-8: three basic blocks of 16, 32 and 64 channels; quick to train on a CPU."""
    return _cifar_resnet(8, num_classes=num_classes, in_channels=in_channels, width=width)


@models.register
def resnet20(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """CIFAR ResNet-20: nine basic blocks of 16, 32 and 64 channels."""
    return _cifar_resnet(20, num_classes=num_classes, in_channels=in_channels, width=width)


@models.register
def resnet18(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """ResNet-18; a 3x3 stem without max-pool for images up to 64 pixels, the standard stem above."""
    return _imagenet_resnet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)


@models.register
def resnet50(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """ResNet-50; a 3x3 stem without max-pool for images up to 64 pixels, the standard stem above."""
    return _imagenet_resnet(Bottleneck, [3, 4, 6, 3], num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)
