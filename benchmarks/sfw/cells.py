"""The cells: which training arms are pruned once, on which network, with which seed."""

from __future__ import annotations

from benchmarks.cells import NETS, Cell

RATIOS = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98")
SWEEP = (*(part for r in RATIOS for part in ("--sparsity", r)), "--n", "2", "--m", "4")

MAIN = {
    "sgd": ("--constraint", "none"),
    "k-sparse": ("--constraint", "k-sparse"),  # as published: K 5 %, tau 15, gradient rescaling
    "k-support": ("--constraint", "k-support"),
    "nm": ("--constraint", "nm"),
    "group-k-support": ("--constraint", "group-k-support", "--set", "sfw.channels=[0.5]"),
}
ABLATED = {
    "k-sparse-tau-2": ("--constraint", "k-sparse", "--tau", "2"),
    "k-sparse-tau-5": ("--constraint", "k-sparse", "--tau", "5"),
    "k-sparse-tau-50": ("--constraint", "k-sparse", "--tau", "50"),
    "k-sparse-k-1": ("--constraint", "k-sparse", "--k-fraction", "0.01"),
    "k-sparse-k-20": ("--constraint", "k-sparse", "--k-fraction", "0.2"),
    "k-support-tau-2": ("--constraint", "k-support", "--tau", "2"),
    "k-support-tau-5": ("--constraint", "k-support", "--tau", "5"),
    "nm-tau-5": ("--constraint", "nm", "--tau", "5"),
    "nm-tau-2": ("--constraint", "nm", "--tau", "2"),
    "sgd-wd-2e-3": ("--constraint", "none", "--set", "train.weight_decay=0.002"),
    "k-sparse-init": ("--constraint", "k-sparse", "--sfw-init"),
    "nm-init": ("--constraint", "nm", "--sfw-init"),
}


def first_pass() -> list[Cell]:
    """Every arm and ablation once, validation only; the thin network first, because it is quick."""
    return [
        Cell(arm, net, 0, "sfw-prune", (*options, *SWEEP), judged="val") for net in NETS for arm, options in {**MAIN, **ABLATED}.items()
    ]


def main_arms() -> list[Cell]:
    """The sets as they are, three seeds, test accuracy."""
    return [Cell(arm, net, seed, "sfw-prune", (*options, *SWEEP)) for net in NETS for seed in (0, 1, 2) for arm, options in MAIN.items()]


STAGES = {"first-pass": first_pass, "main": main_arms}
