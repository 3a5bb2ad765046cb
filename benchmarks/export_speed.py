"""python -m benchmarks.export_speed: what removed channels are worth in ONNX Runtime: time that fell against MACs that fell.

ResNet-50 at 224 x 224, dense and with half of its channels gone: half of every layer (widths stay multiples of 16), and half of all
channels under one threshold, with widths as they fall and rounded to 8 and to 16; beside it the same by Torch-Pruning's own pruner.
All ranked by the L2 norm of a group's filters over the group's mean, all written by our exporter (profile cpu), all run on 2 threads,
batch 1, in turn. Goal: the time falls at least 1.2 times as much as the MACs. Weights are drawn; a trained network's widths under one
threshold differ more."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.common import header, interleaved, machine
from prunectl import models
from prunectl.export import graph, onnx, profiles, verify
from prunectl.export.artifact import InputSpec
from prunectl.export.session import open_session
from prunectl.pruning import allocate
from prunectl.pruning.channels import describe
from prunectl.pruning.criteria import criteria
from prunectl.pruning.surgery import analyse, compact

RESULT = Path(__file__).parent / "results" / "export_speed.json"
GOAL = 1.2  # share of the time that fell over the share of the MACs that fell
THREADS = 2
SPARSITY = 0.5
PRODUCT = 2048


def dense(name: str, size: int) -> nn.Module:
    return models.build(name, num_classes=1000, in_channels=3, image_size=size).eval()


def ours(net: nn.Module, example: Tensor, allocation: Callable[..., dict[str, list[int]]], width: int) -> nn.Module:
    structure = analyse(net, example)
    views = describe(net, structure)
    norms = {group: criteria.get("l2")(views[group]) for group in allocate.prunable(structure)}
    scores = {group: norm / norm.mean() for group, norm in norms.items()}
    return compact(net, allocation(scores, sparsity=SPARSITY, round_to=width), example).module


def rival(net: nn.Module, example: Tensor, *, one_threshold: bool, width: int) -> nn.Module:
    head = [m for m in net.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.MagnitudeImportance(p=2, normalizer="mean")
    settings = {"pruning_ratio": SPARSITY, "global_pruning": one_threshold, "ignored_layers": head, "round_to": width}
    tp.pruner.MagnitudePruner(net, example, importance, **settings).step()
    return net.eval()


def arms(name: str, size: int) -> Iterator[tuple[str, nn.Module]]:
    """(name, network), the dense one first."""
    example = torch.zeros(1, 3, size, size)
    net = dense(name, size)
    yield "dense", net
    yield "prunectl, half of every layer", ours(net, example, allocate.layerwise, 1)
    yield "Torch-Pruning, half of every layer", rival(dense(name, size), example, one_threshold=False, width=1)
    for width in (1, 8, 16):
        yield f"prunectl, half of all, multiples of {width}", ours(net, example, allocate.globally, width)
        yield f"Torch-Pruning, half of all, multiples of {width}", rival(dense(name, size), example, one_threshold=True, width=width)


def measure(name: str, size: int, rounds: int) -> dict[str, Any]:
    spec = InputSpec((3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tuple(map(str, range(1000))), "noise")
    image = verify.random_batches(spec, n=1)[0]
    macs, calls = {}, {}
    for arm, net in arms(name, size):
        model = onnx.build(net, spec, profiles.load("cpu"))
        macs[arm] = graph.cost(model).macs
        session = open_session(model.SerializeToString(), threads=THREADS)
        calls[arm] = lambda session=session: session.run(None, {spec.name: image})
        print(f"{arm}: {macs[arm] / 1e9:.3f} G MACs", flush=True)
    calls["product"] = matrix_product()
    times = interleaved(calls, rounds=rounds)
    rows = [row(arm, macs, times) for arm in macs]
    ceiling = PRODUCT**3 / statistics.median(times["product"])
    about = {"command": "python -m benchmarks.export_speed", "network": name, "image_size": size, "threads": THREADS, "rounds": rounds}
    raw = {arm: [round(1e3 * t, 3) for t in taken] for arm, taken in times.items()}
    return {**about, "machine": machine(), "ceiling_macs_per_s": ceiling, "rows": rows, "times_ms": raw}


def matrix_product() -> Callable[[], object]:
    """One large product in the same runtime on the same threads: what this CPU can do at best."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((PRODUCT, PRODUCT), dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [PRODUCT, PRODUCT]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", ends[:1], ends[1:], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = open_session(model.SerializeToString(), threads=THREADS)
    return lambda: session.run(None, {"x": numpy_helper.to_array(weight)})


def row(arm: str, macs: dict[str, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios are dense over pruned, that of times the median of the rounds' with its quartiles."""
    ratios = np.array(times["dense"]) / np.array(times[arm])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    fewer = macs["dense"] / macs[arm]
    return {
        "arm": arm,
        "macs": macs[arm],
        "macs_ratio": fewer,
        "median_ms": 1e3 * statistics.median(times[arm]),
        "time_ratio": float(middle),
        "time_ratio_quartiles": [float(low), float(high)],
        "time_over_macs": float(middle) / fewer,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    ceiling = result["ceiling_macs_per_s"]
    lines = [
        "| network | MACs | fewer MACs | median, ms | G MACs/s | faster (quartiles) | faster / fewer MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        low, high = r["time_ratio_quartiles"]
        cells = [r["arm"], f"{r['macs'] / 1e9:.3f} G", f"{r['macs_ratio']:.2f} x", f"{r['median_ms']:.1f}"]
        cells.append(f"{r['macs'] / r['median_ms'] / 1e6:.0f}")
        lines.append(" | ".join(["", *cells, f"{r['time_ratio']:.2f} x ({low:.2f}-{high:.2f})", f"{r['time_over_macs']:.2f}", ""]).strip())
    best, dense = ceiling / 1e9, result["rows"][0]["macs"] / result["rows"][0]["median_ms"] / 1e6
    return [
        *lines,
        "",
        f"A {PRODUCT} x {PRODUCT} matrix product runs at {best:.0f} G MACs/s in the same runtime and rounds,",
        f"the dense network at {dense:.0f}. {GOAL:g} times what the MACs say would be {GOAL * dense:.0f} G MACs/s: the goal asks for",
        "a CPU that the dense network leaves partly idle, for want of cache or of bandwidth.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    header(f"pruned channels in ONNX Runtime, {THREADS} threads; goal {GOAL}")
    torch.manual_seed(0)
    result = measure(args.network, args.size, args.rounds)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
