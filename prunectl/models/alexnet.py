"""AlexNet for small images: Krizhevsky et al., NeurIPS 2012, with BatchNorm.

The convolutions are those of the spline early-bird paper's figures (You et al., TMLR 2022, public code): one max-pool,
no local response normalisation. Differs: no groups (they split the net over two GPUs), and one linear layer after an
average pool in place of the three wide ones."""

from __future__ import annotations

from torch import nn

from prunectl.models.layers import conv, network, scaled
from prunectl.models.names import models


@models.register
def alexnet(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """AlexNet with BatchNorm and a single linear layer, for images from 19 pixels."""
    stages: dict[str, nn.Module] = {}
    c_in = in_channels
    for i, (channels, kernel) in enumerate(((96, 11), (256, 5), (384, 3), (384, 3), (256, 3)), start=1):
        c_out = scaled(channels, width)
        stages[f"conv{i}"] = conv(c_in, c_out, kernel, stride=4, padding=0) if i == 1 else conv(c_in, c_out, kernel)
        stages[f"bn{i}"] = nn.BatchNorm2d(c_out)
        stages[f"relu{i}"] = nn.ReLU()
        if i == 1:
            stages["pool1"] = nn.MaxPool2d(3, stride=2)
        c_in = c_out
    return network(stages, channels=c_in, num_classes=num_classes)
