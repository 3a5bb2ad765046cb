"""The cells: which training arms are pruned once, on which network, with which seed."""

from __future__ import annotations

from benchmarks.cells import Cell

NETS = ("thin", "wide")
RATIOS = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.98")
SWEEP = (*(part for r in RATIOS for part in ("--sparsity", r)), "--n", "2", "--m", "4")

PLAIN = ("--set", "sfw.fade=0")
MAIN = {
    "default": (),  # N:M, fading
    "sgd": ("--constraint", "none"),
    "sgd-fade": ("--constraint", "none", "--set", "sfw.fade=80"),
    "k-sparse": ("--constraint", "k-sparse", *PLAIN),  # as published: K 5 %, tau 15, gradient rescaling
    "k-support": ("--constraint", "k-support", *PLAIN),
    "nm": ("--constraint", "nm", *PLAIN),
    "group-k-support": ("--constraint", "group-k-support", "--set", "sfw.channels=[0.5]", *PLAIN),
    "default-init": ("--sfw-init",),
    "k-support-fade": ("--constraint", "k-support"),
    "k-support-fade-init": ("--constraint", "k-support", "--sfw-init"),
}
ABLATED = {
    "k-sparse-tau-2": ("--constraint", "k-sparse", "--tau", "2", *PLAIN),
    "k-sparse-tau-5": ("--constraint", "k-sparse", "--tau", "5", *PLAIN),
    "k-sparse-tau-50": ("--constraint", "k-sparse", "--tau", "50", *PLAIN),
    "k-sparse-k-1": ("--constraint", "k-sparse", "--k-fraction", "0.01", *PLAIN),
    "k-sparse-k-20": ("--constraint", "k-sparse", "--k-fraction", "0.2", *PLAIN),
    "nm-tau-2": ("--constraint", "nm", "--tau", "2", *PLAIN),
    "nm-tau-5": ("--constraint", "nm", "--tau", "5", *PLAIN),
    "fade-20": ("--set", "sfw.fade=20"),
    "fade-300": ("--set", "sfw.fade=300"),
    "default-tau-5": ("--tau", "5"),
    "k-support-fade-k-20": ("--constraint", "k-support", "--k-fraction", "0.2"),
    "l2-fade": ("--constraint", "lp"),
    "l2-fade-tau-5": ("--constraint", "lp", "--tau", "5"),
    "sgd-wd-2e-3": ("--constraint", "none", "--set", "train.weight_decay=0.002"),
}


def first_pass() -> list[Cell]:
    """Every arm once, validation only; what is ablated on the thin network, because it is quick, and the last set on both."""
    more = {"thin": ABLATED, "wide": {"l2-fade": ABLATED["l2-fade"]}}
    arms = [(net, arm, options) for net in NETS for arm, options in (MAIN | more[net]).items()]
    return [Cell(arm, net, 0, "sfw-prune", (*options, *SWEEP), judged="val") for net, arm, options in arms]


def main_arms() -> list[Cell]:
    """The sets as they are, three seeds, test accuracy."""
    return [Cell(arm, net, seed, "sfw-prune", (*options, *SWEEP)) for net in NETS for arm, options in MAIN.items() for seed in (0, 1, 2)]


STAGES = {"first-pass": first_pass, "main": main_arms}
