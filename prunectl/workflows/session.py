"""What every training verb shares: a run folder, data, a network, and epochs that are logged, checkpointed and resumable."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunectl import data, dist, models
from prunectl.console import Console
from prunectl.data import Dataset, DatasetInfo
from prunectl.errors import CorruptFile, UsageError
from prunectl.files import write_json, write_text
from prunectl.pruning import cost
from prunectl.recipe import Recipe, Train
from prunectl.rundir import RunDir, clear, point_latest, read_json
from prunectl.training import checkpoint, compactmodel
from prunectl.training.evaluate import Accuracy, accuracy
from prunectl.training.loop import Diverged, EpochSummary, Objective, Step, TrainState, steps
from prunectl.training.optimizers import load_state_tensors, sgd, state_tensors
from prunectl.training.precision import Placement, place
from prunectl.training.schedule import learning_rate
from prunectl.versions import versions
from prunectl.workflows.folder import Options
from prunectl.workflows.provenance import changed, commit, hardware, made_from

EVAL_BATCH = 500  # of images up to 64 x 64, fewer of larger ones

LONGEST_WARMUP = 0.5  # of a schedule

MakeOptimizer = Callable[[nn.Module, Train], torch.optim.Optimizer]


class Keeper(Protocol):
    """A part of a workflow whose state goes into the checkpoints."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None: ...


def momentum_sgd(model: nn.Module, t: Train) -> torch.optim.Optimizer:
    return sgd(model, lr=t.lr, momentum=t.momentum, nesterov=t.nesterov, weight_decay=t.weight_decay)


@dataclass
class Session:
    """One run in progress. `steps` is the pruning so far: dropped channels of each step, replayable.

    notes: what a workflow has to say of the epoch that is ending; they go into its line of the metrics."""

    recipe: Recipe
    run: RunDir
    ui: Console
    data: Dataset
    place: Placement
    arguments: dict[str, Any]
    state: TrainState
    steps: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    macs: int = 0
    teacher_macs: int = 0
    spent_flops: int = 0
    wall_before_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    make_optimizer: MakeOptimizer = momentum_sgd
    notes: dict[str, Any] = field(default_factory=dict)
    resume: bool = False

    @property
    def wall_s(self) -> float:
        return self.wall_before_s + time.monotonic() - self.started

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.data.info.channels, self.data.info.image_size, self.data.info.image_size

    @property
    def batches(self) -> tuple[int, int]:
        """Optimizer steps an epoch, and the images of one rank's batch: fewer than asked for when the data are fewer."""
        size = max(1, min(self.recipe.train.batch_size, self.data.info.n_train // dist.world_size()))
        return self.data.train_steps(batch_size=size, world=dist.world_size()), size

    @property
    def _eval_batch(self) -> int:
        """As many images as memory holds that a training batch fits in."""
        return min(EVAL_BATCH, max(self.recipe.train.batch_size, EVAL_BATCH * 64**2 // self.data.info.image_size**2))

    @property
    def dense_images(self) -> int:
        """Training images that the whole schedule shows."""
        per_epoch, size = self.batches
        return per_epoch * size * dist.world_size() * self.recipe.train.epochs

    def example(self) -> Tensor:
        return torch.zeros(1, *self.input_shape)

    def accuracy(self, split: str, model: nn.Module | None = None) -> Accuracy:
        """On a whole split, of `model` or of the network as it would be saved (its average, where one is kept)."""
        batches = self.data.eval_batches(split, batch_size=self._eval_batch, rank=dist.rank(), world=dist.world_size())
        if model is not None or self.state.average is None:
            return accuracy(model or self.state.model, batches, self.place)
        with averaged(self.state):
            return accuracy(self.state.model, batches, self.place)

    def rate(self, done: float) -> float:
        """The learning rate of the recipe when the share `done` of its schedule is done."""
        t = self.recipe.train
        warmup = min(LONGEST_WARMUP, t.warmup_epochs / max(1, t.epochs))
        return learning_rate(done, lr=t.lr, schedule=t.schedule, milestones=t.milestones, warmup=warmup)

    def write_model(
        self, name: str, model: nn.Module, weights: Mapping[str, Tensor] | None = None, further_steps: Sequence[dict[str, Any]] = ()
    ) -> compactmodel.CompactModel | None:
        """Saves a network as `name`/ in the run folder; rank 0 only. further_steps: pruning that it alone has undergone."""
        if dist.rank() != 0:
            return None
        return compactmodel.write(
            self.run.path / name,
            model,
            arguments=self.arguments,
            steps=[*self.steps, *further_steps],
            data=self.data.info.to_dict(),
            parent=self.run.path.name,
            weights=weights,
        )

    def result(self, outcome: str, **fields: Any) -> dict[str, Any]:
        """The record of a finished run, written last: with it the run is finished."""
        record = {
            "schema": 1,
            "verb": self.recipe.verb,
            "run": self.run.path.name,
            "outcome": outcome,
            "model": self.recipe.model.name,
            "dataset": self.recipe.data.name,
            "seed": self.recipe.seed,
            **({"start": self.recipe.start} if self.recipe.start else {}),
            "wall_s": round(self.wall_s, 3),
            "versions": versions(),
            **fields,
            "warnings": list(self.ui.warnings),
        }
        if dist.rank() == 0:
            write_json(self.run.result, record)
        return record


def begin(recipe: Recipe, run: RunDir, options: Options, ui: Console, make_optimizer: MakeOptimizer = momentum_sgd) -> Session:
    """Data, network and optimizer of a recipe, as new. Everything that can be refused is refused here."""
    placement = place(options.device, recipe.train.precision)
    summary = data.describe(recipe.data.name, data_dir=recipe.data.dir)
    size = models.input_size(
        recipe.model.name,
        summary.image_size,
        image_size=recipe.data.image_size,
        in_channels=summary.channels,
        num_classes=len(summary.classes),
    )
    if size.size != summary.image_size and not summary.photos:
        how = {"pad": "padded", "resize": "resized"}[size.fit]
        ui.say(f"images of {summary.image_size} pixels are {how} to {size.size} for {recipe.model.name}")
    images = data.load(
        recipe.data.name,
        data_dir=recipe.data.dir,
        image_size=size.size,
        fit="pad" if size.fit == "none" else size.fit,
        val_fraction=recipe.data.val_fraction,
        train_images=recipe.data.train_images,
        augment=recipe.data.augment,
        workers=options.workers,
        download=options.download,
    )
    arguments: dict[str, Any] = {
        "name": recipe.model.name,
        "num_classes": len(images.info.classes),
        "in_channels": images.info.channels,
        "image_size": size.size,
        "width": recipe.model.width,
    }
    pruned: list[dict[str, Any]] = []
    if recipe.start:
        arguments, pruned, model = _start(recipe, arguments, images.info, ui)
    else:
        model = models.build(**arguments, seed=recipe.seed)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"model {recipe.model.name}: all its weights are frozen (requires_grad is False), so nothing can be trained")
    session = Session(recipe, run, ui, images, placement, arguments, TrainState(model, _nothing()), pruned)
    session.make_optimizer, session.resume = make_optimizer, options.resume
    adopt(session, model)
    return session


def record(session: Session) -> None:
    """recipe.yaml and run.json: from here on the folder is this run's."""
    if dist.rank() != 0:
        return
    if session.run.replaced:
        clear(session.run)
    hard = hardware(session.place)
    info = {"argv": sys.argv, "versions": versions(), "hardware": hard, "seed": session.recipe.seed, "git": commit()}
    info |= {"images": session.data.fingerprint(), "made_from": made_from(session.recipe)}
    if session.resume:
        _compare(session, info)
    write_text(session.run.recipe, session.recipe.to_yaml())  # first: it marks the folder as a run
    write_json(session.run.info, info)
    point_latest(session.run)


def _compare(session: Session, now: Mapping[str, Any]) -> None:
    """Says what is not as it was when the run began. Raises UsageError for other images, whose parts would be others too."""
    then = read_json(session.run.info) if session.run.info.is_file() else {}
    if then.get("images", now["images"]) != now["images"]:
        raise UsageError(
            f"the images of {session.data.info.name} are not those that {session.run.path} was begun with, so its validation images "
            "may have been trained on: put them back as they were, or begin again with --overwrite"
        )
    for file in changed(session.run):
        session.ui.warn(f"{file} is not what it was when this run began: its epochs so far were trained with the other")
    for what in ("precision", "ranks", "cuda"):
        was, is_ = (info.get("hardware", {}).get(what) for info in (then, now))
        if then and was != is_:
            session.ui.warn(f"this run began with {what} {was} and goes on with {is_}: its result is of both")


def adopt(session: Session, model: nn.Module) -> None:
    """`model` becomes the network in training, with a fresh optimizer and average."""
    t = session.recipe.train
    placed = session.place.put(model)
    session.state.model = placed
    session.state.optimizer = session.make_optimizer(placed, t)
    reset_average(session)
    session.macs = cost.count(placed, session.input_shape).macs
    if session.place.autocast_dtype == torch.float16 and session.state.scaler is None:
        session.state.scaler = torch.amp.GradScaler(session.place.device.type)


def teach(session: Session, dense: nn.Module) -> None:
    """The small network learns from `dense` too, and pays for its answers."""
    session.state.teacher = session.place.put(dense).eval()
    session.teacher_macs = cost.count(dense, session.input_shape).macs


def reset_average(session: Session) -> None:
    """The average of the weights, where one is kept, begins at the weights as they are now."""
    weights = session.state.model.state_dict()
    session.state.average = {k: v.detach().clone() for k, v in weights.items()} if session.recipe.train.ema else None


def enter(session: Session, keeper: Keeper | None = None) -> bool:
    """Makes the folder the run's, and goes back to its newest checkpoint; True where there is none and training is to begin."""
    record(session)
    dist.together()
    new = not _resume(session, keeper)
    t = session.recipe.train
    if t.warmup_epochs > LONGEST_WARMUP * t.epochs > 0:
        session.ui.say(f"train.warmup_epochs = {t.warmup_epochs:g} is over half of {t.epochs} epochs: warming up for half")
    dist.together()
    return new


def fit(session: Session, keeper: Keeper | None = None, rate: Callable[[float], float] | None = None) -> Iterator[Step]:
    """Trains to the end of the schedule from where `enter` has left the session; the caller's `for` body acts between steps.

    rate: share of the schedule done -> learning rate; None: the recipe's own.
    At the end of each epoch, after the body: validation accuracy, one line, metrics, a checkpoint. Raises Diverged."""
    s, t = session, session.recipe.train
    if s.state.epoch == 0 and t.epochs:
        _save(s, keeper)
    per_epoch, size = s.batches if t.epochs else (1, 1)
    objective = Objective(t.label_smoothing, t.l1_gammas, t.ema, t.distill)
    schedule, seed = rate or s.rate, s.recipe.seed
    running = steps(
        s.state, s.data, s.place, schedule, epochs=t.epochs, steps_per_epoch=per_epoch, batch_size=size, seed=seed, objective=objective
    )
    label = f"{s.recipe.model.name} on {s.data.info.name}"
    dist.from_rank_0(s.state.model)
    for step in s.ui.track(running, total=per_epoch * t.epochs, done=per_epoch * s.state.epoch, label=label):
        s.spent_flops += cost.training_flops(s.macs, step.images) + cost.forward_flops(s.teacher_macs, step.images)
        yield step
        if step.summary:
            _end_of_epoch(s, step.summary, keeper)


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The averaged weights in the place of the trained ones, for the block."""
    if state.average is None:
        yield
        return
    trained = {k: v.detach().clone() for k, v in state.model.state_dict().items()}
    state.model.load_state_dict(state.average)
    try:
        yield
    finally:
        state.model.load_state_dict(trained)


def training_images_per_s(rows: list[dict[str, Any]]) -> float | None:
    """Median over epochs of images a second, training alone."""
    rates = sorted(r["images_per_s"] for r in rows)
    return rates[len(rates) // 2] if rates else None


def _end_of_epoch(s: Session, summary: EpochSummary, keeper: Keeper | None) -> None:
    dist.from_rank_0(s.state.model)
    dist.tensors_of_rank_0((s.state.average or {}).values())
    val = s.accuracy("val")
    if not math.isfinite(val.loss):  # the last step may have spoilt weights whose loss was still finite
        raise Diverged(f"the validation loss is no longer finite after {summary.epoch} epochs; lower train.lr or check the data")
    rate = summary.images / summary.seconds
    s.rows.append(
        {
            "epoch": summary.epoch,
            "train_loss": round(summary.loss, 5),
            "train_top1": round(summary.train_top1, 3),
            "val_loss": round(val.loss, 5),
            "val_top1": round(val.top1, 3),
            "lr": summary.lr,
            "images_per_s": round(rate, 1),
            "seconds": round(summary.seconds, 3),
            "macs": s.macs,
            **s.notes,
        }
    )
    s.ui.say(
        f"epoch {summary.epoch:>3}/{s.recipe.train.epochs}  loss {summary.loss:.3f}  train {summary.train_top1:5.2f} %  "
        f"val {val.top1:5.2f} %  lr {summary.lr:.4g}  {rate:.0f} images/s"
    )
    _save(s, keeper)


def _save(s: Session, keeper: Keeper | None) -> None:
    if dist.rank() != 0:
        return
    s.run.log(s.rows)
    kept, kept_meta = keeper.state() if keeper else ({}, {})
    tensors = {
        **{f"model/{k}": v for k, v in s.state.model.state_dict().items()},
        **{f"optimizer/{k}": v for k, v in state_tensors(s.state.model, s.state.optimizer).items()},
        **{f"average/{k}": v for k, v in (s.state.average or {}).items()},
        **{f"kept/{k}": v for k, v in kept.items()},
    }
    meta = {
        "steps": s.steps,
        "spent_flops": s.spent_flops,
        "wall_s": s.wall_s,
        "rows": s.rows,
        "warnings": s.ui.warnings,
        "kept": kept_meta,
        "averaged_steps": s.state.averaged_steps,
        "scaler": s.state.scaler.state_dict() if s.state.scaler else None,
    }
    checkpoint.save(s.run.checkpoints, s.state.epoch, tensors, meta)


def _resume(s: Session, keeper: Keeper | None) -> bool:
    """Whether there is one: the newest whole checkpoint, where there is one: weights, pruning, momentum, average and the keeper's state."""
    found, passed_over = checkpoint.newest(s.run.checkpoints)
    for sentence in passed_over:
        s.ui.warn(f"{sentence}; " + (f"taking that of epoch {found.epoch} instead" if found else "there is none before it"))
    if found is None:
        checkpoint.discard(s.run.checkpoints)
        if s.resume:
            s.ui.say(f"nothing to resume in {s.run.path}: starting from the beginning")
        return False
    if found.meta["steps"] != s.steps:
        s.steps = found.meta["steps"]
        adopt(s, compactmodel.rebuild(s.arguments, s.steps))
        if s.recipe.train.distill and s.recipe.verb == "find-ticket":
            teach(s, compactmodel.read(s.run.path / "dense").module())
    try:
        s.state.model.load_state_dict(found.section("model"))
    except RuntimeError:
        raise UsageError(
            f"the checkpoints in {s.run.path} do not fit {s.recipe.model.name} as it is now: put it back as it was, or add --overwrite"
        ) from None
    load_state_tensors(s.state.model, s.state.optimizer, found.section("optimizer"))
    if s.state.average is not None:
        s.state.average = {k: v.to(s.place.device) for k, v in found.section("average").items()}
        s.state.averaged_steps = found.meta.get("averaged_steps", found.epoch * s.batches[0])  # not in checkpoints of earlier versions
    if s.state.scaler is not None and found.meta["scaler"]:
        s.state.scaler.load_state_dict(found.meta["scaler"])
    if keeper:
        keeper.restore(found.section("kept"), found.meta["kept"])
    s.state.epoch, s.spent_flops, s.wall_before_s = found.epoch, found.meta["spent_flops"], found.meta["wall_s"]
    s.rows = found.meta["rows"]
    s.ui.warnings[:] = dict.fromkeys([*found.meta.get("warnings", []), *s.ui.warnings])  # said by the run before; part of the result
    s.ui.say(f"resumed {s.run.path} after epoch {found.epoch}")
    return True


def _start(
    recipe: Recipe, arguments: dict[str, Any], info: DatasetInfo, ui: Console
) -> tuple[dict[str, Any], list[dict[str, Any]], nn.Module]:
    """Architecture, pruning and weights of `train --from`."""
    saved = compactmodel.read(compactmodel.locate(Path(str(recipe.start))))
    theirs = saved.plan["model"]
    for key in ("name", "num_classes", "in_channels", "image_size"):
        if theirs[key] != arguments[key]:
            raise UsageError(
                f"--from {recipe.start}: its {key} is {theirs[key]}, this run's {arguments[key]}; give the same model and data set"
            )
    if arguments["width"] not in (1.0, theirs.get("width", 1.0)):
        raise UsageError(
            f"--from {recipe.start}: its width is {theirs.get('width', 1.0):g}; leave model.width = {arguments['width']:g} out"
        )
    if saved.plan["data"]["name"] == info.name and saved.plan["data"].get("n_val") != info.n_val:
        ui.warn(
            f"--from {recipe.start} was trained with {saved.plan['data'].get('n_val')} validation images and this run has {info.n_val}: "
            "it was trained on some of them; give its data.val_fraction"
        )
    try:
        return dict(theirs), list(saved.plan["steps"]), saved.module()
    except CorruptFile as e:
        raise CorruptFile(f"--from {recipe.start}: {e}") from None


def _nothing() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)
