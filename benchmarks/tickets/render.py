"""python -m benchmarks.tickets.render [--check]: docs/evidence/tickets.md from the committed cells, nothing else."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.tickets.cells import EPOCHS, NETS, TRAIN_IMAGES

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[2] / "docs" / "evidence" / "tickets.md"
Rows = dict[str, dict[str, dict[int, dict[str, Any]]]]  # net -> arm -> seed -> result


def cells() -> Rows:
    found: Rows = defaultdict(lambda: defaultdict(dict))
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["net"]][record["arm"]][record["seed"]] = record["result"]
    return found


def test_accuracy(result: dict[str, Any]) -> float:
    return float(result["accuracy"]["top1"] if result["verb"] == "train" else result["accuracy"]["final"])


def row(arm: str, seeds: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> str:
    accuracies = [test_accuracy(r) for r in seeds.values()]
    pairs = [test_accuracy(r) - test_accuracy(dense[s]) for s, r in seeds.items() if s in dense]
    first = next(iter(seeds.values()))
    ticket = first["verb"] == "find-ticket"
    macs, params = (first["macs"]["ticket"], first["params"]["ticket"]) if ticket else (first["macs"], first["params"])
    ratios = [r["training_flops"]["ratio"] for r in seeds.values()] if ticket else [1.0]
    drawn = ", ".join(f"{r['found_epoch']:g}" for r in seeds.values()) if ticket else "-"
    shown = [
        arm,
        str(len(seeds)),
        _mean_sd(accuracies),
        _mean_sd(pairs, sign=True) if ticket else "-",
        drawn,
        f"{macs / 1e6:.2f} M",
        f"{params / 1e3:.1f} k",
        f"{statistics.mean(ratios):.3f}",
    ]
    return "| " + " | ".join(shown) + " |"


def _mean_sd(values: list[float], *, sign: bool = False) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def text() -> str:
    lines = [
        "# Tickets on Fashion-MNIST",
        "",
        "Rendered by `python -m benchmarks.tickets.render` from the committed cells in benchmarks/tickets/results; each cell holds",
        "the command that made it. Do not edit.",
        "",
        f"{TRAIN_IMAGES:,} stratified training images (6,000 more carved for validation before that), the full 10,000-image",
        f"test set, {EPOCHS} epochs, cosine schedule, batch 128. Test accuracy in percent, mean ± sd over seeds, read once at the",
        "end; the difference to dense is paired by seed. Training FLOPs are spent / dense, search and probes included. Wall times",
        "are not read from these cells: they ran beside other work.",
    ]
    for net, arms in cells().items():
        name, width = NETS[net]
        lines += [
            "",
            f"## {net}: {name}, width {width:g}",
            "",
            "| arm | seeds | test accuracy | paired difference | drawn after epochs | MACs | parameters | training FLOPs |",
            "|---|---|---|---|---|---|---|---|",
            *(row(arm, seeds, arms.get("dense", {})) for arm, seeds in sorted(arms.items(), key=lambda a: (a[0] != "dense", a[0]))),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text() else f"{TARGET} differs from the cells: render it again")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
