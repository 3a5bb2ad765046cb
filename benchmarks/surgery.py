"""python -m benchmarks.surgery: scores of every layer of ResNet-50, and its surgery; goals under 2 s each on 2 cores."""

from __future__ import annotations

import statistics

import torch

from benchmarks.common import header, seconds
from prunectl import models
from prunectl.pruning.allocate import layerwise
from prunectl.pruning.channels import describe
from prunectl.pruning.criteria import criteria
from prunectl.pruning.moments import covariances
from prunectl.pruning.surgery import analyse, compact

RUNS = 5


def main() -> None:
    header("ResNet-50 at 224: scores and surgery")
    model = models.build("resnet50", num_classes=1000, in_channels=3, image_size=224)
    example = torch.zeros(1, 3, 224, 224)
    graph = analyse(model, example)
    images = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    looking = seconds(lambda: covariances(model, graph, [images]))
    views = describe(model, graph, covariances=covariances(model, graph, [images]))
    scores = {}
    for name in criteria.names():
        if name == "taylor":
            continue  # its cost is a few backward passes; obs looks at 512 images before
        times = []
        for _ in range(RUNS):
            times.append(seconds(lambda n=name: scores.update({k: criteria.get(n)(v) for k, v in views.items()})))
        print(f"criterion {name:<18} {statistics.median(times):.2f} s")
    plan = layerwise(scores, sparsity=0.5)
    print(f"covariances of {len(images)} images: {looking:.1f} s, the forward pass included")
    print(f"analyse   {statistics.median(seconds(lambda: analyse(model, example)) for _ in range(RUNS)):.2f} s")
    print(f"describe  {statistics.median(seconds(lambda: describe(model, graph)) for _ in range(RUNS)):.2f} s")
    print(f"surgery   {statistics.median(seconds(lambda: compact(model, plan, example)) for _ in range(RUNS)):.2f} s")


if __name__ == "__main__":
    main()
