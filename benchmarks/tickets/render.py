"""python -m benchmarks.tickets.render [--check]: docs/evidence/tickets.md and its picture from the committed cells, nothing else."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cells import EPOCHS, NETS, TRAIN_IMAGES, digest_of, mean_sd, publish, read
from benchmarks.tickets.cells import PERCENT

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[2] / "docs" / "evidence" / "tickets.md"
Seeds = dict[int, dict[str, Any]]  # seed -> result
WALL = Path(__file__).with_name("wall.json")
ALL = ["All 60,000 training images, a tenth of them for validation; one seed.", ""]
NOTES = {
    ("wider", "val"): ["These tickets were drawn by the spline score as it was before commit 05460e5.", ""],
    **{(net, "test"): ALL for net in ("full-thin", "full")},
}
HEAD = (
    "| arm | seeds | accuracy | to dense | to the default | right after the draw | drawn after epochs | MACs | parameters "
    "| training FLOPs | wall time | trained in |"
)


def cells() -> dict[tuple[str, str], dict[str, Seeds]]:
    """(net, judged on) -> arm -> seed -> result."""
    found: dict[tuple[str, str], dict[str, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for record in read(RESULTS):
        precision = record.get("hardware", {}).get("precision", "auto")
        found[record["net"], record.get("judged", "test")][record["arm"]][record["seed"]] = record["result"] | {"precision": precision}
    return found


def accuracy(result: dict[str, Any]) -> float:
    return float(result["accuracy"]["top1"] if result["verb"] == "train" else result["accuracy"]["final"])


def mean_of(seeds: Seeds) -> float:
    return statistics.mean(map(accuracy, seeds.values()))


def paired(seeds: Seeds, others: Seeds) -> str:
    """Mean and sd of the differences of one seed each."""
    return mean_sd([accuracy(r) - accuracy(others[s]) for s, r in seeds.items() if s in others], sign=True)


def share_of(arm: str) -> str:
    """`50` of `l2-50`: the per cent of channels removed, of arms that stand at several."""
    share = arm.rpartition("-")[2]
    return share if share in map(str, PERCENT) else ""


def wall(net: str, arm: str, results: list[dict[str, Any]]) -> str:
    """Time of the whole training, of dense: dense steps before the draw, the ticket's after it."""
    steps = json.loads(WALL.read_text(encoding="utf-8"))["step_time_of_dense"] if WALL.is_file() else {}
    if share_of(arm) not in steps.get(net, {}):
        return "-"
    after = steps[net][share_of(arm)]
    return f"{statistics.mean((r['found_epoch'] + (EPOCHS - r['found_epoch']) * after) / EPOCHS for r in results):.2f}"


def row(net: str, arm: str, arms: dict[str, Seeds]) -> str:
    seeds, default = arms[arm], arms.get(f"default-{share_of(arm)}", {})
    results = list(seeds.values())
    ticket = results[0]["verb"] == "find-ticket"
    macs, params = (results[0]["macs"]["ticket"], results[0]["params"]["ticket"]) if ticket else (results[0]["macs"], results[0]["params"])
    shown = [
        arm,
        str(len(seeds)),
        mean_sd([accuracy(r) for r in results]),
        paired(seeds, arms.get("dense", {})) if ticket else "-",
        paired(seeds, default) if default is not seeds else "-",
        mean_sd([r["accuracy"]["bn_recalibrated"] for r in results]) if ticket else "-",
        ", ".join(f"{r['found_epoch']:g}" for r in results) if ticket else "-",
        f"{macs / 1e6:.2f} M",
        f"{params / 1e3:.1f} k",
        f"{statistics.mean(r['training_flops']['ratio'] for r in results):.3f}" if ticket else "1.000",
        wall(net, arm, results) if ticket else "1.00",
        "/".join(sorted({r["precision"] for r in results})),
    ]
    return "| " + " | ".join(shown) + " |"


def together() -> list[str]:
    """Rivals of the default over every network, sparsity and seed that both have on test images: a line of the table each."""
    pairs: dict[str, list[float]] = defaultdict(list)
    for (_, judged), arms in sorted(cells().items()):
        for arm, seeds in arms.items():
            share, default = share_of(arm), arms.get(f"default-{share_of(arm)}", {})
            if judged == "test" and share and default is not seeds:
                pairs[arm.removesuffix(f"-{share}")] += [accuracy(r) - accuracy(default[s]) for s, r in seeds.items() if s in default]
    rows = []
    for arm, found in sorted(pairs.items(), key=lambda p: -statistics.mean(p[1] or [0])):
        if len(found) > 1:
            error = statistics.stdev(found) / len(found) ** 0.5
            ahead = sum(d > 0 for d in found)
            rows.append(f"| {arm} | {len(found)} | {statistics.mean(found):+.2f} ± {error:.2f} | {ahead} |")
    return rows


def text() -> str:
    lines = [
        "# Tickets on Fashion-MNIST",
        "",
        "Rendered by `python -m benchmarks.tickets.render` from the committed cells in benchmarks/tickets/results; each cell holds",
        "the command that made it, with a flag added where a default of then has changed since. Do not edit.",
        "",
        f"{TRAIN_IMAGES:,} stratified training images (6,000 more carved for validation before that), {EPOCHS} epochs, cosine schedule,",
        "batch 128. Accuracy in percent, mean ± sd over seeds; differences, to dense and to the default at the same sparsity (the number",
        "behind an arm's name: per cent of the channels removed), are paired by seed. Test: the full 10,000-image test set, read once",
        "at the end of a run; the default of these pages is the second one that was read on it",
        "(docs/LOG.md). Validation: the 6,000 images that arms and settings are chosen on; with one seed, differences below about half",
        "a point are noise. Training FLOPs are spent / dense, search and probes included. Wall time, of dense, is reckoned from step times",
        "measured apart (`python -m benchmarks.tickets.wall`) and the epoch of the draw; these cells ran beside other work. Trained in:",
        "the number format; `auto`, where a cell did not record it, is bf16 on processors that have it, as those of these cells had as",
        "far as is known, and fp32 elsewhere. What each arm is: benchmarks/tickets/cells.py.",
        "",
        "![distances of the detectors by epoch](tickets.png)",
    ]
    for (net, judged), arms in sorted(cells().items()):
        name, width = NETS[net]
        lines += [
            "",
            f"## {net}: {name}, width {width:g}, {'validation' if judged == 'val' else 'test'}",
            "",
            *NOTES.get((net, judged), []),
        ]
        lines += [HEAD, "|---" * HEAD.count(" |") + "|"]
        lines += [row(net, arm, arms) for arm in sorted(arms, key=lambda a: (a != "dense", share_of(a), -mean_of(arms[a])))]
    lines += [
        "",
        "## Rivals over the networks and sparsities where both have run, test",
        "",
        "Difference to the default, mean ± standard error of the mean over pairs",
        "of one network, sparsity and seed, as if these were independent; those of one setting share the default's run.",
    ]
    lines += ["", "| arm | pairs | to the default | ahead in |", "|---" * 4 + "|", *together()]
    return "\n".join(lines) + "\n"


def curves() -> dict[str, list[list[float]]]:
    """Name of a line -> [epoch, largest distance], of every detector in the first default search of each net."""
    found = {}
    for record in read(RESULTS):
        result = record["result"]
        named = result.get("curves") or {"spline": result.get("curve") or []}
        if record["arm"] in ("default-50", "detector-spline", "epoch-8") and record["seed"] == 0:
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
