"""The search for the moment to draw: every detector looks at every probe, one of them decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunectl import dist
from prunectl.errors import UsageError
from prunectl.pruning import cost, detectors
from prunectl.pruning.detectors import Detector, Epoch, Reading, Spline
from prunectl.pruning.spline import canvas
from prunectl.pruning.trail import Trail
from prunectl.recipe import Ticket
from prunectl.training.loop import Step
from prunectl.workflows.session import Session

DEFAULT_SPARSITY = 0.5  # of the mask detectors, when the budget is not a share of channels


@dataclass
class Search:
    """Detectors by name, what each has read, and after which epochs each fired first.

    `rewind`: weights of the epoch that --weights rewind:E names. `ticket`: the record of the drawn ticket, once drawn.
    warm_up: epochs of a rising rate, in which a partition that hardly moves has not settled but not begun. latest: epochs after
    which a ticket is drawn that no detector has asked for."""

    deciding: str
    watchers: dict[str, Detector]
    probe: Tensor
    per_epoch: int
    not_before: float = 0.0
    warm_up: float = 0.0
    latest: float = math.inf
    trail: Trail = field(default_factory=Trail)
    draws: int = 1
    draw_every: float = 1.0
    search_only: bool = False
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    fires_at: dict[str, float] = field(default_factory=dict)
    rewind: dict[str, Tensor] = field(default_factory=dict)
    ticket: dict[str, Any] | None = None

    @classmethod
    def of(cls, session: Session, ticket: Ticket) -> Search:
        settings = {k: v for k, v in (("eps", ticket.eps), ("window", ticket.window)) if v is not None}
        name, options = detectors.parse(ticket.detector, **settings)
        mask = {"sparsity": ticket.sparsity or DEFAULT_SPARSITY}
        built: dict[str, dict[str, Any]] = {"spline": {"code": ticket.code}, "early-bird": mask, "epi": mask}
        if name == "epi" and "eps" in options:
            if options["eps"] >= 1:
                raise UsageError(f"--eps {options['eps']:g}: detector epi's stability lies between 0 and 1; take less than 1, e.g. 0.017")
            options["tau"] = 1 - options.pop("eps")  # one option for every detector: how far from perfectly settled is settled
        built[name] = {**built.get(name, {}), **options}
        watchers = {n: detectors.detectors.get(n)(**kwargs) for n, kwargs in built.items()}
        search = cls(name, watchers, _probe(session, ticket), ticket.probes_per_epoch, draws=ticket.draws, draw_every=ticket.draw_every)
        search.search_only = ticket.search_only
        search.warm_up = min(session.recipe.train.warmup_epochs, session.recipe.train.epochs / 2)
        for watcher in list(watchers):
            try:
                watchers[watcher].observe(0.0, session.state.model, search.probe[:2])
            except UsageError:
                if watcher == name:
                    raise
                del watchers[watcher]  # a network without ReLUs, say: another detector decides
            else:
                watchers[watcher].restore({})
        search.readings = {n: [] for n in watchers}
        if ticket.weights.startswith("rewind:"):
            search.not_before = float(ticket.weights[7:])
        if ticket.latest < 1 and name != "epoch":
            search.latest = max(ticket.latest * session.recipe.train.epochs, search.not_before, search.warm_up)
        search._require_a_chance(session)
        return search

    def _require_a_chance(self, session: Session) -> None:
        """Raises UsageError for a schedule that ends before the deciding detector can fire, or with the look that it fires at."""
        watcher, epochs, of_epoch = self.watchers[self.deciding], session.recipe.train.epochs, session.batches[0]
        if isinstance(watcher, Epoch):
            at, there_are, remedy = math.ceil(max(watcher.at, self.not_before) * of_epoch - 1e-9), epochs * of_epoch, "an earlier epoch:N"
        else:
            looks = min(self.per_epoch, of_epoch) if self.deciding == "spline" else 1  # of an epoch
            at, there_are, remedy = watcher.soonest, epochs * looks, "a smaller --window"
            remedy = remedy if getattr(watcher, "window", 1) > 1 else "another detector"
        if at > there_are - (not self.search_only) and not self.at_once:
            what = "step" if isinstance(watcher, Epoch) else "look"
            nothing = "" if at > there_are else ", after the last of which nothing trains a ticket"
            raise UsageError(
                f"detector {self.deciding}: it can fire at {what} {at} at the earliest, and this schedule has {there_are}{nothing};"
                f" take {remedy} or train for longer"
            )

    @property
    def at_once(self) -> bool:
        """Whether the ticket is that of the network as it was made or given, before a step of training."""
        deciding = self.watchers[self.deciding]
        return isinstance(deciding, Epoch) and deciding.at == self.not_before == 0

    @property
    def eps(self) -> float | None:
        """The distance below which the deciding detector fires; None where it fires by another rule."""
        return getattr(self.watchers[self.deciding], "eps", None)

    @property
    def drawn(self) -> int:
        """How many of the draws are behind, those that were left to a later one included."""
        draws = self.ticket["draws"] if self.ticket else []
        return int(draws[-1].get("nth", len(draws))) if draws else 0  # a checkpoint of an earlier version has no number

    def _probes(self, step: Step) -> bool:
        """Whether this step is one of the epoch's evenly spaced probes; the epoch's last step always is."""
        return step.index * self.per_epoch // step.of_epoch > (step.index - 1) * self.per_epoch // step.of_epoch

    def says_draw(self, session: Session, step: Step) -> bool:
        """Whether a draw is due: the deciding detector fires, or the next of several draws has its epoch."""
        deciding, last = self.watchers[self.deciding], step.done > session.recipe.train.epochs - 1e-9
        if self.ticket is None:
            due = isinstance(deciding, Epoch) and step.done > max(deciding.at, self.not_before) - 1e-9  # probe or not
            fires = (due or self._probes(step)) and self.look(session, step)
            return fires and (self.search_only or not last)  # nothing would train what is drawn at the very end
        soonest = self._next_draw(self.ticket["draws"][-1]["epoch"], step.of_epoch)
        return self.drawn < self.draws and soonest <= round(step.done * step.of_epoch) and not last

    def _next_draw(self, epoch: float, of_epoch: int) -> int:
        """The step, counted from the start, of the probe that is `draw_every` after the draw at `epoch`.

        Probe k is taken at step ceil(k of_epoch / per_epoch); so planned and real draws fall on the same steps."""
        step = round(epoch * of_epoch)
        probe, apart = step * self.per_epoch // of_epoch, self.draw_every * self.per_epoch  # the last probe so far; probes in between
        if -(-probe * of_epoch // self.per_epoch) < step:  # the draw was after it
            apart += step * self.per_epoch / of_epoch - probe
        return -(-(probe + max(1, math.ceil(apart - 1e-9))) * of_epoch // self.per_epoch)

    def fit_into(self, session: Session, first: float) -> None:
        """Fewer draws than asked for, where the schedule does not hold them all from `first` on: the budget is met by those."""
        of_epoch = session.batches[0]
        room, step = 0, round(first * of_epoch)
        while room < self.draws and step < session.recipe.train.epochs * of_epoch:
            room += 1
            step = self._next_draw(step / of_epoch, of_epoch)
        if 0 < room < self.draws:
            session.ui.warn(f"the schedule holds {room} of {self.draws} draws from epoch {first:g} on: the budget is met in {room}")
            self.draws = room

    def look(self, session: Session, step: Step) -> bool:
        """One probe of the network by every detector; True when the deciding one fires.

        The masks change from epoch to epoch, and their windows count epochs: their detectors look once an epoch."""
        model = session.state.model
        dist.from_rank_0(model)  # ranks whose batch-norm statistics differ would not draw the same ticket, nor together
        if step.summary and step.summary.epoch == self.not_before:
            self.rewind = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        images = 0
        fires = overdue = False
        with session.place.autocast():
            for name, watcher in self.watchers.items():
                if name in ("early-bird", "epi") and not step.summary:
                    continue
                reading = replace(watcher.observe(step.done, model, self.probe), epoch=round(step.done, 6))
                images += len(self.probe) if name == "spline" else 0
                self.readings[name].append(reading)
                if isinstance(watcher, Spline):
                    self.trail.add(reading.epoch, watcher.past[-1])
                if reading.fires and (isinstance(watcher, Epoch) or step.done > self.warm_up - 1e-9):
                    self.fires_at.setdefault(name, reading.epoch)
                    fires = fires or (name == self.deciding and step.done > self.not_before - 1e-9)
                if name == self.deciding and reading.alive and len(self.readings[name]) >= watcher.soonest:
                    overdue = step.done > self.latest - 1e-9
        session.spent_flops += cost.forward_flops(session.macs, images)
        if dist.told(fires):
            return True
        if overdue := dist.told(overdue):
            session.ui.warn(
                f"the {self.deciding} detector has not fired in {step.done:g} epochs{self.how_near()}: the ticket is drawn all the same"
                " (--set ticket.latest=1 waits for the detector)"
            )
        return overdue

    def how_near(self) -> str:
        """What the deciding detector saw when it came nearest to firing; nothing for one without an eps, or without a full window."""
        eps, window = self.eps, getattr(self.watchers[self.deciding], "window", 0)
        full = [(r.max, r.epoch) for r in self.readings[self.deciding] if r.max is not None and len(r.distances) == window]
        if eps is None or not full:
            return ""
        least, epoch = min(full)
        if least < eps:
            return f"; its distances were below eps {eps:g} only while the rate warmed up, or of a network that tells no images apart"
        return f"; it came nearest after {epoch:g}, with {least:.3f} where eps is {eps:g}"

    def record(self) -> dict[str, Any]:
        return {
            name: {
                "fires_at": self.fires_at.get(name),
                "distances": [{"epoch": r.epoch, "to": list(r.distances), "max": r.max} for r in rows],
            }
            for name, rows in self.readings.items()
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{name}:{k}": v for name, w in self.watchers.items() for k, v in w.state().items()} if self.ticket is None else {}
        tensors.update({f"rewind:{k}": v for k, v in self.rewind.items()} if self.ticket is None else {})
        tensors.update({f"trail:{k}": v for k, v in self.trail.state().items()})
        readings = {name: [[r.epoch, list(r.distances), r.fires] for r in rows] for name, rows in self.readings.items()}
        return tensors, {"readings": readings, "fires_at": self.fires_at, "ticket": self.ticket, "draws": self.draws}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        for name, watcher in self.watchers.items():
            watcher.restore(_named(tensors, name))
        self.trail.restore(_named(tensors, "trail"))
        self.rewind = _named(tensors, "rewind")
        self.readings = {name: [Reading(e, tuple(d), f) for e, d, f in rows] for name, rows in meta["readings"].items()}
        self.fires_at, self.ticket, self.draws = dict(meta["fires_at"]), meta["ticket"], meta.get("draws", self.draws)


def _named(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.partition(":")[2]: v for k, v in tensors.items() if k.partition(":")[0] == name}


def _probe(session: Session, ticket: Ticket) -> Tensor:
    """Fixed training images, the same at every probe and on every rank."""
    if ticket.probe == "canvas":
        if session.data.info.n_train < 2:
            raise UsageError("--probe canvas spans a plane through two training images, and there is one; take --probe batch")
        (first, second), _ = session.data.sample(2, seed=session.recipe.seed)
        side = max(2, round(ticket.probe_images**0.5))
        return session.place.images(canvas(first, second, side=side))
    images, _ = session.data.sample(ticket.probe_images, seed=session.recipe.seed)
    return session.place.images(images.to(torch.float32))
