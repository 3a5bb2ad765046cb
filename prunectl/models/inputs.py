"""Which image size a network sees, found by trying: no table of minimum sizes that could be wrong."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunectl.errors import UsageError
from prunectl.models.factory import build
from prunectl.models.names import ModelName, resolve

SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
PAD_AT_MOST = 4 / 3  # beyond it more than 44 % of the pixels would be border, and resizing serves better


@dataclass(frozen=True)
class InputSize:
    """Height and width that the network sees, in pixels, and how an image gets there."""

    size: int
    fit: Literal["none", "pad", "resize"]


@dataclass(frozen=True)
class _Trial:
    """One network and the data it is for; `problem(size)` builds and runs it."""

    model: ModelName
    num_classes: int
    in_channels: int

    def problem(self, size: int) -> str:
        """Why the network cannot see `size` pixels; empty if it can. Raises UsageError if it returns something else than logits.

        A user's own network runs on the CPU, because it may hold tensors that do not follow a change of device."""
        import torch

        from prunectl.models.shapes import build_without_weights

        on_cpu = self.model.source == "file"
        arguments = {"num_classes": self.num_classes, "in_channels": self.in_channels, "image_size": size}
        net = (build if on_cpu else build_without_weights)(str(self.model), **arguments).eval()
        with torch.device("cpu" if on_cpu else "meta"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            images = torch.zeros(2, self.in_channels, size, size)
            try:
                with _blame(self.model):
                    net(images[:1])
                    logits = net(images)
                    trained = net.train()(images) if on_cpu else logits
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, UsageError) as error:
                return str(error) or type(error).__name__
        expected = (len(images), self.num_classes)
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if got != expected:
            raise UsageError(f"model {self.model} returned {got} for {len(images)} images; expected logits of shape {expected}")
        in_training = tuple(trained.shape) if isinstance(trained, torch.Tensor) else type(trained).__name__
        if in_training != expected:
            raise UsageError(f"model {self.model} returned {in_training} in training mode; expected logits of shape {expected} there too")
        return ""

    def nearest(self, size: int) -> int:
        """`size` if it works, else the next larger size that does, else the next smaller one."""
        larger, smaller = [s for s in SIZES if s > size], [s for s in reversed(SIZES) if s < size]
        for candidate in (size, *larger, *smaller):
            if not self.problem(candidate):
                return candidate
        raise UsageError(f"model {self.model} runs at no image size from {SIZES[0]} to {SIZES[-1]} pixels; at {size}: {self.problem(size)}")


def input_size(name: str, native_size: int, *, image_size: int | None = None, in_channels: int = 3, num_classes: int = 10) -> InputSize:
    """The size at which `name` sees images of `native_size` pixels: their own if it can, else the nearest that works.

    `image_size`, if given, is used as it is. Raises UsageError if it does not work, or if no size does."""
    trial = _Trial(resolve(name), num_classes, in_channels)
    size = trial.nearest(native_size if image_size is None else image_size)
    if image_size not in (None, size):
        raise UsageError(f"data.image_size = {image_size}: {trial.model} needs {size} pixels; set data.image_size={size} or leave it out")
    if size == native_size:
        return InputSize(size, "none")
    return InputSize(size, "pad" if native_size < size <= native_size * PAD_AT_MOST else "resize")


def _blame(model: ModelName) -> AbstractContextManager[None]:
    if model.source != "file":
        return nullcontext()
    from prunectl.models.userfile import blamed_on

    return blamed_on(Path(model.name.rpartition(":")[0]).expanduser())
