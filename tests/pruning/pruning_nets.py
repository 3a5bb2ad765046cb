"""Small networks, one for each thing that couples channels or calls a ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 and eval mode with every parameter and batch-norm statistic far from its initial value.

    Zero-initialised heads and layer scales would hide a wrong channel; biases are positive so that few ReLUs are dead;
    each layer damps its input, or the gates of a deep network saturate and turn rounding errors into large ones."""
    g = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * (0.5 / p[0].numel()) ** 0.5)
            else:
                low, high = (0.0, 0.5) if name.endswith("bias") else (0.5, 1.5)
                p.copy_(low + (high - low) * torch.rand(p.shape, generator=g, dtype=torch.float64))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g, dtype=torch.float64))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g, dtype=torch.float64))
    return model


def images(n: int = 2, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)]


def head(channels: int, classes: int = 5) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def plain(a: int = 16, b: int = 24, c_in: int = 3) -> nn.Sequential:
    return nn.Sequential(*conv_bn(c_in, a), nn.ReLU(), *conv_bn(a, b), nn.ReLU(), *head(b))


def flattened() -> nn.Sequential:
    """16 entries of the linear layer's input belong to each channel of the convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 5)
    )


class Residual(nn.Module):
    """Stem and block write one stream; the ReLUs are a module, a function and a method."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = conv_bn(3, width)
        self.conv1, self.norm1 = conv_bn(width, 20)
        self.conv2, self.norm2 = conv_bn(20, width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.fc(x.relu().mean((2, 3)))


class PreActivation(nn.Module):
    """A stream that only its readers normalise."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 20, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(20), nn.Conv2d(20, width, 3, padding=1, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual: expand, filter each channel, project back onto the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.block = nn.Sequential(*conv_bn(12, 24, 1), nn.ReLU6(), *conv_bn(24, 24, 3, groups=24), nn.ReLU6(), *conv_bn(24, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches of different width side by side, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.left, self.right = nn.Sequential(*conv_bn(12, 16), nn.ReLU()), nn.Sequential(*conv_bn(12, 20, 1), nn.ReLU())
        self.join = nn.Sequential(*conv_bn(36, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.join(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


class SelfConcatenated(nn.Module):
    """cat([x, x]): each channel is read at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.mid = nn.Sequential(*conv_bn(12, 16), nn.ReLU())
        self.join = nn.Sequential(*conv_bn(32, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        return self.fc(self.join(torch.cat([x, x], 1)).mean((2, 3)))


class SkippedConcat(nn.Module):
    """cat([a, b]) + y: y's channels are coupled to a's in one half and to b's in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.a, self.b = nn.Sequential(*conv_bn(12, 16)), nn.Sequential(*conv_bn(12, 20))
        self.y = nn.Sequential(*conv_bn(12, 36, 1))
        self.fc = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.y(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 24), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(24, 12, 1), nn.Conv2d(12, 24, 1)
        self.mix = nn.Sequential(*conv_bn(24, 16), nn.SiLU())
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.mix(x).mean((2, 3)))


class Recurrent(nn.Module):
    """One convolution called twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.step = nn.Conv2d(16, 16, 3, padding=1)
        self.again = self.step
        self.last = nn.Sequential(*conv_bn(16, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.last(F.relu(self.again(F.relu(self.step(x))))).mean((2, 3)))


class OwnRead(nn.Module):
    """A residual block of one convolution: it reads the stream that it writes, as in EfficientNetV2's fused blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.block = nn.Sequential(*conv_bn(16, 16), nn.ReLU())
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


class Slopes(nn.Module):
    """A learned slope for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 16), nn.PReLU(16), *conv_bn(16, 12), nn.PReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


PRUNABLE = {
    "plain": plain,
    "flattened": flattened,
    "residual": Residual,
    "preactivation": PreActivation,
    "depthwise": Depthwise,
    "concatenated": Concatenated,
    "skipped_concat": SkippedConcat,
    "squeeze_excite": SqueezeExcite,
    "recurrent": Recurrent,
    "own_read": OwnRead,
    "slopes": Slopes,
}


class FixedView(nn.Module):
    """The code fixes how many numbers reach `fc1`: 12 channels of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(12 * 4 * 4, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 12 * 4 * 4))))


class OverChannels(nn.Module):
    """Statistics over the channels of `mid` (a group norm), and a gate from their mean and maximum."""

    def __init__(self, across: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.mid = nn.Conv2d(12, 16, 3, padding=1)
        self.across = {"group_norm": nn.GroupNorm(4, 16), "layer_norm": nn.GroupNorm(1, 16), "softmax": nn.Softmax(1)}.get(across)
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.join = nn.Sequential(*conv_bn(16, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        if self.across is not None:
            x = self.across(x)
        else:
            x = x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))
        return self.fc(self.join(x).mean((2, 3)))


class Shortcut(nn.Module):
    """The CIFAR ResNet's option A: the narrow stream is padded with zero channels to the wide one's width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.wide = nn.Sequential(*conv_bn(16, 20), nn.ReLU(), *conv_bn(20, 24))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(F.relu(self.wide(x) + F.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class Halves(nn.Module):
    """The code takes the channels of `mid` apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.mid = nn.Sequential(*conv_bn(12, 16), nn.ReLU())
        self.join = nn.Sequential(*conv_bn(8, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.mid(self.stem(x)).chunk(2, 1)
        return self.fc(self.join(left * torch.sigmoid(right)).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention over positions, by the module and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU(), *conv_bn(16, 16))
        self.by_module = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.by_module(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc((x + self.down(F.relu(self.up(x)))).mean(1))


LOCKED = {
    "fixed_view": (FixedView, {"conv2"}),
    "group_norm": (lambda: OverChannels("group_norm"), {"mid"}),
    "layer_norm": (lambda: OverChannels("layer_norm"), {"mid"}),
    "softmax": (lambda: OverChannels("softmax"), {"mid"}),
    "channel_statistics": (lambda: OverChannels("statistics"), {"mid"}),
    "padded_shortcut": (Shortcut, {"stem.0", "wide.3"}),
    "halves": (Halves, {"mid.0"}),
    "attention": (Attention, {"stem.3", "qkv", "out", "down"}),
}


class Dense(nn.Module):
    """DenseNet's pattern: what a normed stem gives is normed again by every reader of the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = conv_bn(3, 12)
        self.norm1, self.conv1 = nn.BatchNorm2d(12), nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.norm2, self.fc = nn.BatchNorm2d(22), nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.fc(F.relu(self.norm2(x)).mean((2, 3)))


PRUNABLE["dense"] = Dense
