"""Small networks with everything an exporter must get right: BN, a residual sum, a depthwise layer, ReLU6, odd widths."""

import torch
from torch import nn

from prunectl.export.artifact import InputSpec

SPEC = InputSpec((3, 16, 12), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("a", "b", "c", "d", "e"), "made-up", fit="resize")
# conv1: 8 x 3 x 9 kernel at 16 x 12; conv2: 16 x 8 x 9 at 8 x 6; depthwise: 16 x 9 at 8 x 6; point: 16 x 16 at 8 x 6; fc: 5 x 16
KERNELS = 8 * 3 * 9 + 16 * 8 * 9 + 16 * 9 + 16 * 16 + 5 * 16
MACS = 8 * 3 * 9 * 16 * 12 + (16 * 8 * 9 + 16 * 9 + 16 * 16) * 8 * 6 + 5 * 16
BIASES = 8 + 16 + 16 + 16 + 5  # what is left of the four batch norms, and the linear layer's own


class Tiny(nn.Module):
    """Not square on purpose: an axis swapped anywhere changes a shape or a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.point, self.bn4 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = torch.nn.functional.relu6(self.bn2(self.conv2(x)))
        x = x + self.bn4(self.point(self.bn3(self.depthwise(x)).relu()))
        return self.fc(x.relu().mean((2, 3)))


def tiny(seed: int = 0) -> Tiny:
    """Weights and BN statistics far from their initial values, so that no constant equals another."""
    torch.manual_seed(seed)
    net = Tiny()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.2, 1)  # few dead ReLUs, behind which a wrong weight could hide
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def images(n: int = 6, seed: int = 1, spec: InputSpec = SPEC) -> torch.Tensor:
    """Normalised images that once were 8-bit pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, *spec.shape), generator=generator)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (pixels / 255 - mean) / std
