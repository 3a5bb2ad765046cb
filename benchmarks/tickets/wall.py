"""python -m benchmarks.tickets.wall: what a training step of each ticket takes, of a dense step; into wall.json.

The networks of the stage `rivals`, cut at random (a criterion changes which channels go, not how many), and the dense ones take
steps in turn on an otherwise idle machine. A whole run's wall time follows from these and from the epoch of the draw."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from torch import nn

from benchmarks.cells import NETS, TRAIN_IMAGES
from benchmarks.common import interleaved, machine
from benchmarks.tickets.cells import NETS as MEASURED
from benchmarks.tickets.cells import PERCENT
from prunectl import data, models
from prunectl.pruning.budget import Budget
from prunectl.pruning.surgery import compact
from prunectl.pruning.ticket import plan_ticket
from prunectl.training.loop import TrainState, steps
from prunectl.training.optimizers import sgd
from prunectl.training.precision import place as placement

TARGET = Path(__file__).with_name("wall.json")
BATCH, STEPS, ROUNDS = 128, 4, 15


def main() -> None:
    place, images = placement("cpu", "auto"), data.load("fashion-mnist", train_images=TRAIN_IMAGES)
    example = images.sample(1, seed=0)[0][:1].float()

    def trains(model: nn.Module) -> Callable[[], object]:
        placed = place.put(model)
        state = TrainState(placed, sgd(placed, lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4))
        running = steps(state, images, place, lambda done: 0.01, epochs=1000, steps_per_epoch=140, batch_size=BATCH, seed=0)
        return lambda: list(islice(running, STEPS))

    found = {}
    for net in MEASURED:
        name, width = NETS[net]
        dense = models.build(name, num_classes=10, in_channels=1, image_size=28, width=width, seed=0)
        work = {"dense": trains(dense)}
        for percent in PERCENT:
            plan = plan_ticket(dense, example, budget=Budget("channels", percent / 100), criterion="random")
            work[str(percent)] = trains(compact(dense, plan.dropped, example).module)
        times = interleaved(work, rounds=ROUNDS)
        found[net] = {p: statistics.median(t / d for t, d in zip(times[p], times["dense"], strict=True)) for p in map(str, PERCENT)}
        found[net]["dense_ms"] = 1000 * statistics.median(times["dense"]) / STEPS
    TARGET.write_text(json.dumps({"machine": machine(), "step_time_of_dense": found}, indent=1) + "\n", encoding="utf-8")
    print(TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
