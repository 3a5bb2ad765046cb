"""python -m benchmarks.repair RUN: validation accuracy right after pruning, by criterion and by what stands in for the removed channels.

RUN: a find-ticket run; its dense network at the draw is pruned. Batch norm is re-calibrated, nothing is trained on. The
tables of docs/LOG.md are those of the networks named there."""

from __future__ import annotations

import copy
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import header
from prunectl import data
from prunectl.pruning.budget import Budget
from prunectl.pruning.criteria import criteria
from prunectl.pruning.merge import merge_
from prunectl.pruning.moments import covariances
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgery import analyse, compact
from prunectl.pruning.ticket import TicketPlan, plan_ticket
from prunectl.training import compactmodel
from prunectl.training.evaluate import accuracy
from prunectl.training.gradients import mean_gradients
from prunectl.training.precision import place as placement

REPAIRS = ("none", "merge", "reconstruct")
VALIDATION, RECALIBRATION, REPAIR = 3000, 3000, 512  # images


def main() -> None:
    saved = compactmodel.read(Path(sys.argv[1]) / "dense")
    images, place = data.load(saved.plan["data"]["name"], train_images=18_000), placement("cpu", "auto")
    model = place.put(saved.module())
    example = compactmodel.example_input(saved.plan["model"])
    gradients = mean_gradients(model, islice(images.eval_batches("train", batch_size=128), 20), place)

    graph = analyse(model, example)
    with place.autocast():
        seen = covariances(model, graph, (place.images(x) for x, _ in images.eval_batches("train", batch_size=64, limit=REPAIR)))

    def pruned(plan: TicketPlan, repair: str) -> nn.Module:
        source = copy.deepcopy(model)
        with place.autocast():
            if repair == "merge":
                merge_(source, plan.graph, plan.dropped)
            elif repair == "reconstruct":
                batches = images.eval_batches("train", batch_size=64, limit=REPAIR)
                reconstruct_(source, plan.graph, plan.dropped, (place.images(x) for x, _ in batches))
            small = compact(source, plan.dropped, example).module
            recalibrate_(small, (place.images(x) for x, _ in images.eval_batches("train", batch_size=100, limit=RECALIBRATION)))
        return small

    def validation(network: nn.Module) -> float:
        return accuracy(network, images.eval_batches("val", batch_size=500, limit=VALIDATION), place).top1

    header(f"repair: dense {validation(model):.1f} % on {VALIDATION} validation images")
    print("| sparsity | criterion | " + " | ".join(REPAIRS) + " |")
    for sparsity in (0.3, 0.5, 0.7):
        for criterion in criteria.names():
            looks = {"gradients": gradients, "covariances": seen}
            plan = plan_ticket(model, example, budget=Budget("channels", sparsity), criterion=criterion, **looks)
            cells = [f"{validation(pruned(plan, repair)):.1f}" for repair in REPAIRS]
            print(f"| {sparsity} | {criterion} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
