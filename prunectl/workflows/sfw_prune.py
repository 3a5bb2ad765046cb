"""`prunectl sfw-prune`: Algorithm 2 of Lu et al., ICLR 2022.

Make a set for every tensor, start inside them, train once with Frank-Wolfe steps; then prune that one network to every
ratio asked for, with no retraining. With no constraint the same harness trains by SGD: the rival to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunectl import dist
from prunectl.console import Console, percent, si
from prunectl.errors import UsageError
from prunectl.files import write_csv, write_json
from prunectl.pruning import cost, oneshot
from prunectl.pruning.constraints import DEFAULT_K_FRACTION, ConstraintPlan, sets_for
from prunectl.pruning.fade import Target, fade_, targets
from prunectl.pruning.magnitudes import EXPONENTS, counts_above
from prunectl.pruning.sfw import SFW
from prunectl.pruning.sfw_init import LEAST_BATCH, sfw_init_
from prunectl.pruning.sfw_schedule import adaptive_scale
from prunectl.recipe import Recipe, Sfw, Train
from prunectl.rundir import RunDir
from prunectl.training.loop import Step
from prunectl.workflows.folder import Options, from_disk, run_folder
from prunectl.workflows.session import (
    Session,
    averaged,
    begin,
    enter,
    fit,
    momentum_sgd,
    reset_average,
    training_images_per_s,
)
from prunectl.workflows.sweep import channel_tickets, pattern, require_removable, require_share, sweep

FADE_EVERY = 5  # steps: a ranking of all weights costs a few per cent of a step
SFW_INIT_STEPS = 390  # Lu et al.: one epoch of CIFAR-10 in batches of 128


def sfw_prune(recipe: Recipe, options: Options | None = None, ui: Console | None = None) -> dict[str, Any]:
    """Trains, sweeps and returns the result; a finished run answers from disk.

    The trained network is saved as model/ in the run folder. Test images are read once, at the end."""
    options, ui = options or Options(), ui or Console(verbosity=-1)
    with run_folder(recipe, options) as run:
        if run.finished:
            return from_disk(run, ui)
        session, sets = prepared(recipe, run, options, ui)
        if enter(session, sets):
            start_inside(session, sets)
        faded = targets(sets.settings.sparsity, layerwise=sets.settings.pooling == "layerwise", pattern=sets.pattern)
        for step in fit(session, sets, rate_of(session, sets.settings)):
            fade(session, sets.settings, faded, step)
            if step.summary:
                sets.note(session)
        return _finish(session, sets)


@dataclass
class Sets:
    """The sets of a run, made once from the norms of the untouched network, and what each epoch shows.

    weights: for each epoch, how many entries of each ranked tensor are above 10^1, ..., 10^-10 (tensors, 12).
    scales: what SFW-Init learned, by parameter name."""

    settings: Sfw
    plan: ConstraintPlan = field(default_factory=lambda: ConstraintPlan({}))
    weights: list[Tensor] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def pattern(self) -> tuple[int, int] | None:
        return self.settings.n_of_m if self.settings.wants_pattern else None

    def make_optimizer(self, model: nn.Module, t: Train) -> torch.optim.Optimizer:
        """A Frank-Wolfe optimizer in which every trainable parameter has its set; SGD where there is no constraint."""
        s = self.settings
        if s.constraint == "none":
            return momentum_sgd(model, t)
        if t.nesterov:
            raise UsageError("recipe train.nesterov = true: Frank-Wolfe steps have no Nesterov form; leave it out, or take constraint none")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        n, m = s.n_of_m
        self.plan = sets_for(parameters.items(), s.constraint, tau=s.tau, k_fraction=s.k_fraction, n=n, m=m, p=float(s.p))
        groups = [{"params": [p], "constraint": self.plan.sets[name]} for name, p in parameters.items()]
        return SFW(groups, lr=t.lr, momentum=t.momentum, rescale=s.rescale, weight_decay=t.weight_decay)

    def note(self, session: Session) -> None:
        """Where the steps and the weights stand, for the epoch's line of the metrics and for weights.csv."""
        optimizer = session.state.optimizer
        if isinstance(optimizer, SFW):
            seen = optimizer.statistics()
            session.notes = {
                "fw_gap": seen.gap.item(),
                "active_fraction": seen.active_fraction.item(),
                "clamped": int(seen.clamped),
                "screened": int(seen.screened),
            }
        ranked = oneshot.prunable(session.state.model, self.settings.scope)
        self.weights.append(torch.stack([counts_above(w) for w in ranked.values()]).cpu())

    def rows(self, model: nn.Module) -> list[dict[str, Any]]:
        """`weights` as a table: a row for each epoch and ranked tensor."""
        ranked = oneshot.prunable(model, self.settings.scope)
        return [
            {"epoch": epoch, "layer": name, "entries": w.numel(), **{f"above_1e{e}": n for e, n in zip(EXPONENTS, above, strict=True)}}
            for epoch, counts in enumerate(self.weights, 1)
            for (name, w), above in zip(ranked.items(), counts.tolist(), strict=True)
        ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weights": torch.stack(self.weights)} if self.weights else {}, {"scales": self.scales}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.weights, self.scales = list(tensors.get("weights", ())), dict(meta["scales"])


def prepared(recipe: Recipe, run: RunDir, options: Options, ui: Console) -> tuple[Session, Sets]:
    """Data, network and sets as new. What could only be refused after training is refused here."""
    sets = Sets(recipe.sfw or Sfw())
    s = sets.settings
    session = begin(recipe, run, options, ui, sets.make_optimizer)
    if s.wants_pattern:
        oneshot.nm_masks(oneshot.prunable(session.state.model), *s.n_of_m)
    if s.constraint == "group-k-support" and s.channels:
        require_removable(session, s.channels)
    size = session.batches[1] if recipe.train.epochs else recipe.train.batch_size
    if s.sfw_init and s.constraint != "none" and size < LEAST_BATCH:
        raise UsageError(f"--sfw-init cuts every batch in three, and a batch here has {size}: raise train.batch_size, or leave it out")
    for share in s.sparsity:
        require_share(session.state.model, share, s)
    changed = {name for name in ("tau", "p", "channels", "rescale") if getattr(s, name) != Sfw.model_fields[name].default}
    for flag, given, reader in (
        ("--sfw-init", s.sfw_init and s.constraint == "none", "any set, and there is none"),
        ("--k-fraction", s.k_fraction is not None and s.constraint not in DEFAULT_K_FRACTION, f"{', '.join(DEFAULT_K_FRACTION)}"),
        ("--tau", "tau" in changed and s.constraint == "none", "any set, and there is none"),
        ("sfw.rescale", "rescale" in changed and s.constraint == "none", "any set, and there is none"),
        ("sfw.p", "p" in changed and s.constraint != "lp", "lp"),
        ("sfw.channels", "channels" in changed and s.constraint != "group-k-support", "group-k-support"),
    ):
        if given:
            ui.warn(f"{flag} does nothing with constraint {s.constraint}: it is for {reader}")
    if sets.plan.on_l2_ball:
        why = f"no {s.n_of_m[1]} input channels make a group" if s.constraint == "nm" else "they have no filters"
        ui.say(f"constraint {s.constraint}; on an L2 ball, because {why}: {', '.join(sets.plan.on_l2_ball)}")
    return session, sets


def start_inside(session: Session, sets: Sets) -> None:
    """The network as it enters training: scaled by SFW-Init where asked, and inside its sets."""
    optimizer = session.state.optimizer
    if not isinstance(optimizer, SFW):
        return
    if sets.settings.sfw_init:
        sets.scales = _initialised(session, sets)
    optimizer.feasible_()
    reset_average(session)


def _initialised(session: Session, sets: Sets) -> dict[str, float]:
    """The scales that SFW-Init gave to the network's tensors; in full precision, on images in an order no epoch has."""
    recipe, place = session.recipe, session.place
    per_epoch, size = session.batches
    count = min(SFW_INIT_STEPS, per_epoch)
    images = islice(session.data.train_batches(recipe.train.epochs, batch_size=size, seed=recipe.seed), count)
    batches = session.ui.track(((place.images(x), y.to(place.device)) for x, y in images), total=count, label="SFW-Init")
    scales = sfw_init_(session.state.model, sets.plan.sets, batches, lr=recipe.train.lr, rescale=sets.settings.rescale)
    session.spent_flops += 2 * cost.training_flops(session.macs, count * (2 * size // 3))
    low, high = min(scales.values()), max(scales.values())
    session.ui.say(f"SFW-Init: {len(scales)} tensors scaled by {low:.3g} to {high:.3g}, learned in {count} steps")
    return scales


def fade(session: Session, settings: Sfw, removed: Sequence[Target], step: Step) -> None:
    """Shrinks what the next ratio of the sweep would remove, every few steps, the more the later and the higher the rate."""
    steps = round(step.done * step.of_epoch)
    if not settings.fading or not removed or steps % FADE_EVERY:
        return
    train = session.recipe.train
    rate = session.state.optimizer.param_groups[0]["lr"] / train.lr
    weights = {name: w for name, w in oneshot.prunable(session.state.model, settings.scope).items() if w.requires_grad}
    share = FADE_EVERY * settings.fading / (step.of_epoch * train.epochs) * rate * step.done / train.epochs
    fade_(weights, removed[steps // FADE_EVERY % len(removed)](weights), share)


def rate_of(session: Session, settings: Sfw) -> Callable[[float], float]:
    """The recipe's learning rate, times the published x0.7 / x1.06 where that rule is on.

    A function of the epoch-mean losses logged so far, so that a resumed run goes on with the same rate. Never above 1 where
    a step is a plain share of the way to the vertex."""
    t = session.recipe.train
    bounded = settings.constraint != "none"
    adaptive = bounded and settings.dynamic_lr and t.schedule == "multistep"
    highest = 1.0 if bounded and settings.rescale == "none" else math.inf

    def rate(done: float) -> float:
        scale = adaptive_scale([row["train_loss"] for row in session.rows], t.epochs) if adaptive else 1.0
        return min(highest, session.rate(done) * scale)

    return rate


def _finish(session: Session, sets: Sets) -> dict[str, Any]:
    recipe, s = session.recipe, sets.settings
    with averaged(session.state):
        model = session.state.model
        session.write_model("model", model)
        dense = session.accuracy(recipe.data.final, model)
        rows = sweep(session, model, s)
        at_pattern = pattern(session, model, s) if s.wants_pattern else None
        tickets = channel_tickets(session, model, s) if s.constraint == "group-k-support" and s.channels else None
    counted = cost.count(model, session.input_shape)
    if dist.rank() == 0:
        _write_files(session, sets, rows, dense.top1)
    return session.result(
        "pruned",
        epochs=recipe.train.epochs,
        accuracy={"dense": dense.top1, "dense_top5": dense.top5, "split": recipe.data.final},
        sweep=rows,
        pattern=at_pattern,
        channel_tickets=tickets,
        constraint=s.constraint,
        on_l2_ball=list(sets.plan.on_l2_ball),
        fw_gap=session.rows[-1].get("fw_gap") if session.rows else None,
        params=counted.params,
        macs=counted.macs,
        training_flops=session.spent_flops,
        images_per_s=training_images_per_s(session.rows),
        saved="model",
    )


def _write_files(session: Session, sets: Sets, rows: list[dict[str, Any]], dense: float) -> None:
    from prunectl.report.sweep import plot_sweep

    path, recipe = session.run.path, session.recipe
    write_csv(path / "sweep.csv", rows)
    weights = sets.rows(session.state.model)
    write_csv(path / "weights.csv", weights)
    write_json(path / "weights.json", {"schema": 1, "rows": weights})
    title = f"{recipe.model.name} on {recipe.data.name}, constraint {sets.settings.constraint}, {recipe.train.epochs} epochs"
    plot_sweep(path / "sweep.png", rows, dense=dense, title=title, split=recipe.data.final)
    if sets.scales:
        write_json(path / "sfw_init.json", {"schema": 1, "scales": sets.scales})


def show(result: dict[str, Any], ui: Console) -> None:
    a, head = result["accuracy"], ["weights left", "as pruned", "batch norm re-calibrated"]
    ui.table(
        f"{result['model']} on {result['dataset']}, constraint {result['constraint']}, {result['epochs']} epochs: "
        f"{a['split']} accuracy, %, dense {a['dense']:.2f}",
        ["sparsity, %", *head],
        [[f"{100 * r['sparsity']:g}", f"{r['nonzero']:,}", *_accuracies(r)] for r in result["sweep"]],
    )
    if p := result["pattern"]:
        ui.table("pattern", ["", *head[1:]], [[f"{p['n']}:{p['m']}", *_accuracies(p)]])
    if tickets := result["channel_tickets"]:
        ui.table(
            "channels removed for good, with no retraining",
            ["channels removed, %", "parameters", "MACs", *head[1:], "reconstructed too"],
            [
                [f"{100 * t['removed']:.1f}", si(t["params"]), si(t["macs"]), *_accuracies(t), percent(t["accuracy_reconstructed"])]
                for t in tickets
            ],
        )
        ui.say(f"saved in {', '.join(str(Path(result['run']) / t['saved']) for t in tickets)}")
    ui.say(f"run: {result['run']} (sweep.csv, sweep.png, weights.csv); any ratio: prunectl export {result['run']} --sparsity 0.9")


def _accuracies(row: Mapping[str, Any]) -> list[str | None]:
    return [percent(row["accuracy_raw"]), percent(row["accuracy_bn_recalibrated"])]
