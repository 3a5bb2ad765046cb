"""python -m benchmarks.probe: what one look at the partition costs, as a share of an epoch of 50,000 images.

256 probe images, window 3; the epoch is extrapolated from measured training steps of batch 128. Also the memory of all
window + 1 codes, and all three detectors together as they look by default: the partition four times an epoch, the masks once."""

from __future__ import annotations

import statistics
from itertools import islice

from benchmarks.common import header, random_images, seconds
from prunectl import models
from prunectl.pruning.detectors import EarlyBird, Epi, Spline
from prunectl.recipe import Ticket
from prunectl.training.loop import TrainState, steps
from prunectl.training.optimizers import sgd
from prunectl.training.precision import place as placement

BATCH, STEPS, LOOKS = 128, 2, 8
PROBES = Ticket().probes_per_epoch
NETS = ("resnet8", "resnet20", "preresnet-20", "resnet18", "vgg16", "preresnet-101")


def main() -> None:
    header("probe of 256 images / epoch of 50,000 images")
    place = placement("cpu", "auto")
    data = random_images(5_000, 3, 32)
    probe = place.images(data.sample(256, seed=0)[0])
    for name in NETS:
        model = place.put(models.build(name, num_classes=10, in_channels=3, image_size=32))
        state = TrainState(model, sgd(model, lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4))
        running = steps(state, data, place, lambda done: 0.01, epochs=100, steps_per_epoch=39, batch_size=BATCH, seed=0)
        next(running)
        spline, masks = Spline(), [EarlyBird(sparsity=0.5), Epi(sparsity=0.5)]
        shares, together = [], []
        for look in range(LOOKS):
            step = seconds(lambda running=running: list(islice(running, STEPS))) / STEPS
            with place.autocast():
                code = seconds(lambda s=spline, m=model, e=look: s.observe(e, m, probe))
                other = sum(seconds(lambda d=d, m=model, e=look: d.observe(e, m, probe)) for d in masks)
            epoch = step * 50_000 / BATCH
            if look >= spline.window:  # a full queue: every comparison is made
                shares.append(code / epoch)
                together.append((PROBES * code + other) / epoch)
        megabytes = sum(c.nbytes for c in spline.past) / spline.window * (spline.window + 1) / 1e6
        print(
            f"{name:<14} probe {100 * min(shares):.2f}-{100 * max(shares):.2f} % of an epoch (goal 1), "
            f"all detectors {100 * statistics.median(together):.2f} % (median, goal 2), codes {megabytes:.1f} MB",
            flush=True,
        )
        del model, state, running


if __name__ == "__main__":
    main()
