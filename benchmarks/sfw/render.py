"""python -m benchmarks.sfw.render [--check]: docs/evidence/sfw.md and its picture from the committed cells, nothing else."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cells import EPOCHS, NETS, TRAIN_IMAGES, digest_of, mean_sd, publish, read

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[2] / "docs" / "evidence" / "sfw.md"
Arms = dict[str, list[dict[str, Any]]]  # arm -> results, one a seed
USUAL = ("50 %", "70 %", "80 %", "90 %", "2:4")
KINDS = {"accuracy_bn_recalibrated": "batch norm re-calibrated", "accuracy_raw": "as pruned"}


def cells() -> dict[tuple[str, str], Arms]:
    """(net, judged on) -> arm -> results."""
    found: dict[tuple[str, str], Arms] = defaultdict(lambda: defaultdict(list))
    for record in read(RESULTS):
        found[record["net"], record["judged"]][record["arm"]].append(record["result"])
    return found


def curve(results: list[dict[str, Any]], kind: str) -> dict[str, list[float]]:
    """Column -> one accuracy a seed: dense, each ratio, the pattern."""
    columns: dict[str, list[float]] = {"dense": [r["accuracy"]["dense"] for r in results]}
    for i, first in enumerate(results[0]["sweep"]):
        columns[f"{100 * first['sparsity']:g} %"] = [r["sweep"][i][kind] for r in results]
    if results[0]["pattern"]:
        columns[f"{results[0]['pattern']['n']}:{results[0]['pattern']['m']}"] = [r["pattern"][kind] for r in results]
    return columns


def chosen_by(columns: dict[str, list[float]]) -> list[float]:
    """One mean a seed over the ratios and the pattern that users prune to."""
    return [sum(values) / len(USUAL) for values in zip(*(columns[c] for c in USUAL), strict=True)]


def text() -> str:
    lines = [
        "# Trained once, pruned to any ratio, on Fashion-MNIST",
        "",
        "Rendered by `python -m benchmarks.sfw.render` from the committed cells in benchmarks/sfw/results; each cell holds the command",
        "that made it, with a flag added where a default of then has changed since. Do not edit.",
        "",
        f"{TRAIN_IMAGES:,} stratified training images (6,000 more carved for validation before that), {EPOCHS} epochs, cosine schedule,",
        "batch 128, then one-shot global magnitude pruning with no retraining. Accuracy in percent, mean ± sd over seeds. Validation:",
        "the 6,000 images that arms and settings are chosen on, one seed. Mean: of 50, 70, 80, 90 % and 2:4, by which the default",
        "set was chosen on validation images (docs/LOG.md). What each arm is: benchmarks/sfw/cells.py.",
        "",
        "![accuracy by sparsity](sfw.png)",
    ]
    for (net, judged), arms in sorted(cells().items()):
        name, width = NETS[net]
        for kind, words in KINDS.items():
            head = [*curve(next(iter(arms.values())), kind), "mean"]
            lines += ["", f"## {net}: {name}, width {width:g}, {'validation' if judged == 'val' else 'test'}, {words}", ""]
            lines += ["| arm | seeds | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
            for arm, results in sorted(arms.items()):
                columns = curve(results, kind)
                cellsof = [mean_sd(values) for values in (*columns.values(), chosen_by(columns))]
                lines.append(f"| {arm} | {len(results)} | " + " | ".join(cellsof) + " |")
    return "\n".join(lines) + "\n"


def curves() -> dict[str, dict[str, dict[str, float]]]:
    """Net and split -> arm -> ratio -> mean accuracy, re-calibrated."""
    return {
        f"{net}, {judged}": {
            arm: {c: sum(v) / len(v) for c, v in curve(results, "accuracy_bn_recalibrated").items() if ":" not in c}
            for arm, results in arms.items()
        }
        for (net, judged), arms in sorted(cells().items())
    }


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    found = curves()
    figure = Figure(figsize=(5.5 * len(found), 4.5), layout="constrained")
    for axes, (title, arms) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for arm, points in sorted(arms.items()):
            axes.plot(list(points), list(points.values()), marker=".", label=arm)
        axes.set(title=title, xlabel="weights removed", ylabel="accuracy, %, batch norm re-calibrated")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(path, metadata={"Description": digest_of(found)})


if __name__ == "__main__":
    publish({TARGET: text}, {TARGET.with_suffix(".png"): (plot, curves)})
