"""python -m benchmarks.cpu_training: fp32 steps on the CPU, placed as prunectl does, against torch's own layout and allocation.

How memory is kept is a matter of the whole process, so that each measurement has its own; both kinds run in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F

from benchmarks.common import header, seconds
from prunectl import models
from prunectl.training.optimizers import sgd
from prunectl.training.precision import Placement, place

NETS = {"resnet8": (1.0, 1, 28, 128), "resnet18": (0.25, 1, 28, 128), "mobilenet_v2": (0.5, 3, 32, 64)}  # width, channels, size, batch
PAIRS, STEPS, WARM_UP = 5, 8, 3


def step_seconds(kind: str, name: str) -> float:
    """Median of one training step, in this process."""
    width, channels, size, batch = NETS[name]
    here = place("cpu", "fp32") if kind == "prunectl" else Placement(torch.device("cpu"), None, channels_last=False)
    model = here.put(models.build(name, num_classes=10, in_channels=channels, image_size=size, width=width)).train()
    optimizer = sgd(model, lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4)
    x, y = torch.randn(batch, channels, size, size), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(here.images(x)), y).backward()
        optimizer.step()

    return statistics.median([seconds(step) for _ in range(WARM_UP + STEPS)][WARM_UP:])


def elsewhere(kind: str, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.cpu_training", kind, name]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    header("training steps in fp32: prunectl's placement / torch's own")
    for name, (width, channels, size, batch) in NETS.items():
        pairs = [(elsewhere("prunectl", name), elsewhere("plain", name)) for _ in range(PAIRS)]
        ours, plain = (batch / statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        what = f"{name} x {width:g}, {channels}x{size}x{size}, batch {batch}"
        print(f"{what:<42} {ours:.0f} images/s, plain {plain:.0f}; ratio of times {ratio:.2f} (median of {PAIRS} pairs)", flush=True)


if __name__ == "__main__":
    print(step_seconds(*sys.argv[1:3])) if sys.argv[1:] else main()
