"""python -m benchmarks.tickets.render [--check]: docs/evidence/tickets.md and its picture from the committed cells, nothing else."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cells import EPOCHS, NETS, TRAIN_IMAGES, digest_of, mean_sd, publish, read

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[2] / "docs" / "evidence" / "tickets.md"
Seeds = dict[int, dict[str, Any]]  # seed -> result
HEAD = "| arm | seeds | accuracy | paired difference | right after the draw | drawn after epochs | MACs | parameters | training FLOPs |"


def cells() -> dict[tuple[str, str], dict[str, Seeds]]:
    """(net, judged on) -> arm -> seed -> result."""
    found: dict[tuple[str, str], dict[str, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for record in read(RESULTS):
        found[record["net"], record.get("judged", "test")][record["arm"]][record["seed"]] = record["result"]
    return found


def accuracy(result: dict[str, Any]) -> float:
    return float(result["accuracy"]["top1"] if result["verb"] == "train" else result["accuracy"]["final"])


def row(arm: str, seeds: Seeds, dense: Seeds) -> str:
    results = list(seeds.values())
    pairs = [accuracy(r) - accuracy(dense[s]) for s, r in seeds.items() if s in dense]
    ticket = results[0]["verb"] == "find-ticket"
    macs, params = (results[0]["macs"]["ticket"], results[0]["params"]["ticket"]) if ticket else (results[0]["macs"], results[0]["params"])
    shown = [
        arm,
        str(len(seeds)),
        mean_sd([accuracy(r) for r in results]),
        mean_sd(pairs, sign=True) if ticket else "-",
        mean_sd([r["accuracy"]["bn_recalibrated"] for r in results]) if ticket else "-",
        ", ".join(f"{r['found_epoch']:g}" for r in results) if ticket else "-",
        f"{macs / 1e6:.2f} M",
        f"{params / 1e3:.1f} k",
        f"{statistics.mean(r['training_flops']['ratio'] for r in results):.3f}" if ticket else "1.000",
    ]
    return "| " + " | ".join(shown) + " |"


def text() -> str:
    lines = [
        "# Tickets on Fashion-MNIST",
        "",
        "Rendered by `python -m benchmarks.tickets.render` from the committed cells in benchmarks/tickets/results; each cell holds",
        "the command that made it. Do not edit.",
        "",
        f"{TRAIN_IMAGES:,} stratified training images (6,000 more carved for validation before that), {EPOCHS} epochs, cosine schedule,",
        "batch 128. Accuracy in percent, mean ± sd over seeds; the difference to dense is paired by seed. Test: the full 10,000-image",
        "test set, read once at the end. Validation: the 6,000 images that arms and settings are chosen on, one seed, so differences",
        "below about half a point are noise. Training FLOPs are spent / dense, search and probes included. Wall times are not read",
        "from these cells: they ran beside other work. What each arm is: benchmarks/tickets/cells.py.",
        "",
        "![distances of the detectors by epoch](tickets.png)",
    ]
    for (net, judged), arms in sorted(cells().items()):
        name, width = NETS[net]
        lines += ["", f"## {net}: {name}, width {width:g}, {'validation' if judged == 'val' else 'test'}", "", HEAD, "|---" * 9 + "|"]
        ordered = sorted(arms.items(), key=lambda a: (a[0] != "dense", -accuracy(next(iter(a[1].values())))))
        lines += [row(arm, seeds, arms.get("dense", {})) for arm, seeds in ordered]
    return "\n".join(lines) + "\n"


def curves() -> dict[str, list[list[float]]]:
    """Name of a line -> [epoch, largest distance], of every detector in the first default search of each net."""
    found = {}
    for record in read(RESULTS):
        result = record["result"]
        named = result.get("curves") or {"spline": result.get("curve") or []}
        if record["arm"] in ("default50", "detector-spline", "epoch-8") and record["seed"] == 0:
            found.update(
                {f"{record['net']}, {record['arm']}: {name}": [p for p in points if p[1] is not None] for name, points in named.items()}
            )
    return {name: points for name, points in found.items() if points}


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves().items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="epochs", ylabel="largest of the last distances", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Description": digest_of(curves())})


if __name__ == "__main__":
    publish({TARGET: text}, {TARGET.with_suffix(".png"): (plot, curves)})
