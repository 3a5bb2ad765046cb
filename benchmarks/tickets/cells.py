"""The cells: which arms run on which network with which seed, and the command line of each.

Meant for ten machine-hours, and past that: of the arms that vary one criterion, and of the draws, only the thin net has cells."""

from __future__ import annotations

from benchmarks.cells import Cell

NETS = ("thin", "wide")
AT_ONCE = ("--detector", "epoch:1")  # 5 % of the schedule: arms of a criterion are compared at one moment, on one dense network
HALF = ("--sparsity", "0.5")
SPLINE = ("--criterion", "spline")
GLOBAL_RAW = ("--scope", "global", "--set", "ticket.pooling=raw")
HALFS_MACS = ("--target-macs", "0.253")  # what half of the channels of every layer leaves; half of all channels leaves other MACs
RIVALS = "benchmarks.tickets.rivals"
AFTER_TRAINING = "benchmarks.tickets.after_training"
SEEDS = (0, 1, 2)
PERCENT = (30, 50, 70)  # of the channels removed
# Ahead on the thin net's validation images in `criteria`, the forms of spline aside. The wide net's own cells came after its `rivals`:
# there fpgm, l1 and bn-scale are the first three, no more than 0.31 point ahead of these, which one seed cannot tell.
_AHEAD = ("taylor", "l2", "fpgm")
BEST = {"thin": _AHEAD, "wide": _AHEAD}


def rivals() -> list[Cell]:
    """The default against the best rivals of `criteria` at three sparsities, drawn at one moment, beside dense; test accuracy."""
    dense = [Cell("dense", net, seed, "train") for net in NETS for seed in SEEDS]
    return [*dense, *(cell for percent in PERCENT for seed in SEEDS for net in NETS for cell in _at(percent, net, seed))]


def _at(percent: int, net: str, seed: int) -> list[Cell]:
    removed = ("--sparsity", f"{percent / 100:g}")
    ranked = [("default", removed, "prunectl"), *((name, (*removed, "--criterion", name), "prunectl") for name in (*BEST[net], "random"))]
    ranked.append(("tp-magnitude", (*removed, "--criterion", "tp-magnitude"), RIVALS))
    return [Cell(f"{name}-{percent}", net, seed, "find-ticket", options, program=program) for name, options, program in ranked]


def again() -> list[Cell]:
    """Where l2 led the default by more than the deviation of three pairs: three pairs more, of seeds that nothing had run with."""
    return [cell for seed in (3, 4, 5) for cell in _at(30, "wide", seed) if cell.arm in ("default-30", "l2-30")]


def steep() -> list[Cell]:
    """Which criterion wins where most channels go and criteria differ: the wide net, three seeds, validation only."""
    ranked = [(name, ("--criterion", name)) for name in ("obs", "spline", "spline-signed", "l2", "taylor", "random")]
    ranked += [
        ("spline-rho-0.5", ("--criterion", "spline", "--set", "ticket.rho=0.5")),
        ("scratch", ("--set", "ticket.weights=reinit")),
    ]
    return [
        Cell(f"{name}-steep", "wide", seed, "find-ticket", ("--sparsity", "0.7", *options), judged="val")
        for seed in SEEDS
        for name, options in ranked
    ]


def _ticket(
    arm: str,
    *options: str,
    at: tuple[str, ...] = AT_ONCE,
    budget: tuple[str, ...] = HALF,
    program: str = "prunectl",
    nets: tuple[str, ...] = ("thin",),
) -> list[Cell]:
    return [Cell(arm, net, 0, "find-ticket", (*budget, *at, *options), judged="val", program=program) for net in nets]


def _criterion(name: str, *options: str, program: str = "prunectl") -> list[Cell]:
    return _ticket(name, "--criterion", name, *options, program=program, nets=NETS)


def _pooled(criterion: str, pooling: str) -> list[Cell]:
    options = ("--criterion", criterion, "--scope", "global", "--set", f"ticket.pooling={pooling}")
    return _ticket(f"{criterion}-global-{pooling}", *options, budget=HALFS_MACS)


def draws() -> list[Cell]:
    """When to draw: an oracle sweep of fixed epochs, and what each detector chooses."""
    fixed = [cell for at in ("0", "0.5", "1", "2", "4", "8") for cell in _ticket(f"epoch-{at}", at=("--detector", f"epoch:{at}"))]
    ruled = [
        *_ticket("detector-spline", at=()),
        *_ticket(
            "detector-published",
            *("--set", "ticket.probe=canvas", "--set", "ticket.probes_per_epoch=1", "--set", "ticket.code=bn"),
            at=("--eps", "0.16", "--window", "3"),
        ),
        *_ticket("detector-early-bird", at=("--detector", "early-bird")),
        *_ticket("detector-epi", at=("--detector", "epi")),
    ]
    return [Cell("dense", "thin", 0, "train", judged="val"), *fixed, *ruled]


def criteria() -> list[Cell]:
    """Which channels go, and what stands in for them, one seed, validation only."""
    ranked = [
        cell
        for name in ("obs", "spline", "spline-signed", "spline-published", "l1", "l2", "bn-scale", "fpgm", "taylor", "random")
        for cell in _criterion(name)
    ]
    theirs = [
        *_criterion("tp-magnitude", program=RIVALS),
        *_ticket("tp-lamp-global", "--criterion", "tp-lamp", *GLOBAL_RAW, budget=HALFS_MACS, program=RIVALS),
        *_ticket("tp-magnitude-global", "--criterion", "tp-magnitude", *GLOBAL_RAW, budget=HALFS_MACS, program=RIVALS),
    ]
    spline = [
        *_ticket("spline-rho-0", *SPLINE, "--set", "ticket.rho=0"),
        *_ticket("spline-rho-0.5", *SPLINE, "--set", "ticket.rho=0.5"),
        *_ticket("spline-merge", *SPLINE, "--merge"),
        *_ticket("spline-bare", *SPLINE, "--set", "ticket.repair=none"),
        *_ticket("spline-global", *SPLINE, *GLOBAL_RAW, budget=HALFS_MACS),
        *_ticket("obs-global", "--criterion", "obs", *GLOBAL_RAW, budget=HALFS_MACS),
        *_ticket("obs-bare", "--criterion", "obs", "--set", "ticket.repair=none"),
        *_pooled("obs", "mean"),
        *_pooled("obs", "macs"),
        *_pooled("spline", "mean"),
        *_pooled("spline", "macs"),
        *_pooled("l2", "raw"),
        *_pooled("l2", "mean"),
        *_pooled("l2", "macs"),
        *_ticket("l2-bare", "--criterion", "l2", "--set", "ticket.repair=none"),
        *_ticket("scratch", "--set", "ticket.weights=reinit", nets=NETS),
        *_ticket("after-training", at=(), program=AFTER_TRAINING),
    ]
    return [*ranked, *theirs, *spline]


def goal() -> list[Cell]:
    """A fifth of the training FLOPs on the wide net, three seeds, test accuracy; before that, on validation, how it was chosen.

    Each is augmented the way that suits it on validation: shifts and mirror images the dense network, mirror images the ticket."""
    fifth = ("--detector", "epoch:0.25", "--target-macs", "0.185", "--set", "ticket.rewarm_epochs=1")
    flip = ("--set", "data.augment=flip")
    chosen = [
        Cell("dense", "wider", 0, "train", judged="val"),
        Cell("dense-flip", "wider", 0, "train", flip, judged="val"),
        Cell("fifth", "wider", 0, "find-ticket", fifth, judged="val"),
        Cell("fifth-flip", "wider", 0, "find-ticket", (*fifth, *flip), judged="val"),
        Cell("fifth-none", "wider", 0, "find-ticket", (*fifth, "--set", "data.augment=none"), judged="val"),
        Cell("fifth-batch64", "wider", 0, "find-ticket", (*fifth, "--set", "train.batch_size=64", "--set", "train.lr=0.05"), judged="val"),
        Cell("fifth-flip-wd", "wider", 0, "find-ticket", (*fifth, *flip, "--set", "train.weight_decay=1e-3"), judged="val"),
    ]
    read_once = [(Cell("fifth-flip", "wider", s, "find-ticket", (*fifth, *flip)), Cell("dense", "wider", s, "train")) for s in SEEDS]
    return [*chosen, *(cell for pair in read_once for cell in pair)]


def full() -> list[Cell]:
    """The default once on all 60,000 images at full width, beside dense."""
    nets = ("full-thin", "full")
    return [cell for net in nets for cell in (Cell("dense", net, 0, "train"), Cell("default-50", net, 0, "find-ticket", HALF))]


STAGES = {"rivals": rivals, "again": again, "draws": draws, "criteria": criteria, "steep": steep, "goal": goal, "full": full}
