"""Training as a generator: one `Step` for every optimizer step, and whoever wants to act writes a `for` body.

The body may replace `state.model` and `state.optimizer` (a ticket drawn in the middle of an epoch): the next step uses
the new ones. The order of images, their augmentation and every random draw of epoch e are functions of (seed, e) alone,
so that an epoch repeated after a crash repeats bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from prunectl import dist
from prunectl.errors import UsageError, VerificationFailed
from prunectl.training.precision import Placement

CHECK_EVERY = 50  # steps between looks at the loss: each is a synchronisation on CUDA


class Diverged(VerificationFailed):
    """The training loss is no longer a finite number."""


class TrainData(Protocol):
    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, drop_last: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class TrainState:
    """What training changes. `average` is the exponential average of the weights of so many steps, or None."""

    model: nn.Module
    optimizer: Optimizer
    epoch: int = 0
    average: dict[str, Tensor] | None = None
    averaged_steps: int = 0
    scaler: torch.amp.GradScaler | None = None
    teacher: nn.Module | None = None


@dataclass(frozen=True)
class EpochSummary:
    epoch: int
    loss: float
    train_top1: float
    lr: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """After an optimizer step. done: epochs trained; summary: of the epoch that ended with this step, else None."""

    done: float
    index: int
    of_epoch: int
    images: int
    summary: EpochSummary | None


@dataclass(frozen=True)
class Objective:
    label_smoothing: float = 0.0
    l1_gammas: float = 0.0
    ema: float | None = None
    distill: float = 0.0


@dataclass
class _Tally:
    """Sums of one epoch, kept on the device."""

    loss: Tensor
    right: Tensor
    images: int = 0
    started: float = field(default_factory=time.monotonic)


def steps(
    state: TrainState,
    data: TrainData,
    place: Placement,
    rate: Callable[[float], float],
    *,
    epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    seed: int,
    objective: Objective = Objective(),
) -> Iterator[Step]:
    """Trains from `state.epoch` to `epochs`, yielding after every optimizer step.

    rate: share of the schedule done -> learning rate. batch_size is per rank; steps_per_epoch the number of batches
    that `data` gives. Raises Diverged when the loss is not finite."""
    ranks = dist.world_size()
    while state.epoch < epochs:
        epoch = state.epoch
        torch.manual_seed(seed * 1_000_003 + epoch)  # dropout and the like: a function of (seed, epoch)
        tally = _Tally(torch.zeros((), device=place.device), torch.zeros((), device=place.device, dtype=torch.long))
        batches = data.train_batches(epoch, batch_size=batch_size, seed=seed, rank=dist.rank(), world=ranks)
        wrapped: tuple[nn.Module, nn.Module] | None = None
        for i, (x, y) in enumerate(batches):
            model = state.model
            if wrapped is None or wrapped[0] is not model:
                wrapped = (model, _shared(model, place, place.images(x[:2])) if ranks > 1 else model)
                model.train()
            lr = rate((epoch + i / steps_per_epoch) / epochs)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            _one_step(state, wrapped[1], place.images(x), y.to(place.device, non_blocking=True), place, objective, tally)
            done = i + 1
            if done % CHECK_EVERY == 0 or done == steps_per_epoch:
                _check_finite(tally.loss, epoch + done / steps_per_epoch)
            summary = None
            if done == steps_per_epoch:
                state.epoch = epoch + 1
                summary = _summary(epoch + 1, tally, lr)
            yield Step(epoch + done / steps_per_epoch, done, steps_per_epoch, len(y) * ranks, summary)


def _shared(model: nn.Module, place: Placement, x: Tensor) -> nn.Module:
    """The network with gradients averaged over ranks; that some of its parameters get none is to be known beforehand."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    with place.autocast():
        found = torch.autograd.grad(model(x).float().sum(), wanted, allow_unused=True)
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=any(g is None for g in found))


def _one_step(state: TrainState, model: nn.Module, x: Tensor, y: Tensor, place: Placement, objective: Objective, tally: _Tally) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    try:
        with place.autocast():
            logits = model(x)
    except ValueError as e:
        if len(x) > 1:
            raise
        raise UsageError(f"a batch of one image cannot be trained on ({e}): take train.batch_size of 2 or more") from None
    logits = logits.float()
    loss = F.cross_entropy(logits, y, label_smoothing=objective.label_smoothing)
    if state.teacher is not None and objective.distill:
        loss = (1 - objective.distill) * loss + objective.distill * _soft_loss(state.teacher, x, logits, place)
    if state.scaler is not None:
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
    else:
        loss.backward()
    if objective.l1_gammas:
        for m in state.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None and m.weight.grad is not None:
                m.weight.grad.add_(m.weight.detach().sign(), alpha=objective.l1_gammas)
    if state.scaler is not None:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    if state.average is not None and objective.ema is not None:
        _update_average(state.average, state.model, _decay(objective.ema, state.averaged_steps))
        state.averaged_steps += 1
    tally.loss += loss.detach() * len(y)
    tally.right += (logits.detach().argmax(1) == y).sum()
    tally.images += len(y)


def _soft_loss(teacher: nn.Module, x: Tensor, logits: Tensor, place: Placement, temperature: float = 4.0) -> Tensor:
    """Hinton et al. 2015: KL divergence to the teacher's answers, softened; scaled by T^2 to keep gradients comparable."""
    with torch.no_grad(), place.autocast():
        target = teacher(x)
    soft = F.log_softmax(target.float() / temperature, 1)
    return F.kl_div(F.log_softmax(logits / temperature, 1), soft, log_target=True, reduction="batchmean") * temperature**2


def _decay(decay: float, steps: int) -> float:
    """The share of itself that the average of so many steps keeps: little at first, or it would hold on to untrained weights.

    The ramp is that of TensorFlow's ExponentialMovingAverage with num_updates."""
    return min(decay, (1 + steps) / (10 + steps))


@torch.no_grad()
def _update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            average[name].lerp_(t, 1 - decay)
        else:
            average[name].copy_(t)


def _check_finite(loss_sum: Tensor, done: float) -> None:
    if not math.isfinite(loss_sum.item()):
        raise Diverged(f"the training loss is no longer finite after {done:.2f} epochs; lower train.lr or check the data")


def _summary(epoch: int, tally: _Tally, lr: float) -> EpochSummary:
    sums = dist.summed(
        torch.stack([tally.loss.double(), tally.right.double(), torch.tensor(float(tally.images), device=tally.loss.device).double()])
    )
    loss, right, images = sums.tolist()
    return EpochSummary(epoch, loss / images, 100 * right / images, lr, int(images), time.monotonic() - tally.started)
