"""python -m benchmarks.train_loop: images a second of prunectl's loop against a bare loop in the same format and layout.

ResNet-18 with the 3x3 stem, batch 128, 3x32x32. The bare loop has its batches ready; prunectl's augments, counts,
checks for divergence and yields. Both train the same number of steps in turn."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F

from benchmarks.common import header, paired, random_images
from prunectl import models
from prunectl.training.loop import TrainState, steps
from prunectl.training.optimizers import sgd
from prunectl.training.precision import place as placement

BATCH, STEPS, PAIRS = 128, 2, 5


def main() -> None:
    place = placement("cpu", "auto")
    header(f"training loop in {place.name}: prunectl / bare loop")
    data = random_images(50_000, 3, 32)
    arguments = {"num_classes": 10, "in_channels": 3, "image_size": 32}
    ours = place.put(models.build("resnet18", **arguments))
    state = TrainState(ours, sgd(ours, lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4))
    running = steps(state, data, place, lambda done: 0.01, epochs=100, steps_per_epoch=390, batch_size=BATCH, seed=0)

    model = place.put(models.build("resnet18", **arguments)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    ready = [(place.images(x), y) for x, y in islice(data.train_batches(0, batch_size=BATCH, seed=0), STEPS)]

    def bare() -> None:
        for x, y in ready:
            optimizer.zero_grad(set_to_none=True)
            with place.autocast():
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()

    def prunectl_loop() -> None:
        for _ in islice(running, STEPS):
            pass

    a, b, ratio = paired(prunectl_loop, bare, pairs=PAIRS)
    images = BATCH * STEPS
    rates = f"prunectl {images / a:.1f} images/s, bare loop {images / b:.1f}"
    print(f"{rates}; ratio of times {ratio:.3f} (median of {PAIRS} pairs, goal 1.05)")


if __name__ == "__main__":
    main()
