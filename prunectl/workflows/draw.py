"""The draw: rank the channels, remove the redundant ones for good, and put the small network in the dense one's place.

A ticket may be drawn in several steps, each on the network that the step before has left and trained on; what is
recorded is the whole way from the dense network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prunectl import dist, models
from prunectl.console import si
from prunectl.pruning import cost
from prunectl.pruning.budget import Budget
from prunectl.pruning.merge import merge_
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgery import Compacted, carry, compact, replay
from prunectl.pruning.ticket import TicketPlan, check_against_plan, composed, plan_ticket
from prunectl.recipe import Ticket
from prunectl.training.gradients import mean_gradients
from prunectl.training.optimizers import momentum_of, set_momentum
from prunectl.workflows.search import Search
from prunectl.workflows.session import Session, adopt, reset_average, teach

GRADIENT_BATCHES = 20
RECALIBRATION_BATCH = 100
REPAIR_IMAGES, REPAIR_BATCH = 512, 64
ON_THE_WAY = 0.25  # how far off draws before the last may be, as a share of what they remove


def preflight(session: Session, settings: Ticket) -> TicketPlan:
    """The plan that the untrained network would get: refuses before training what could only be refused after it."""
    plan = _plan(session, settings, 1, 1)
    if settings.draws > 1:
        model, before = session.state.model, None
        for nth in range(1, settings.draws + 1):
            step = _plan(session, settings, nth, settings.draws, before, model)
            model = compact(model, step.dropped, session.example()).module
            before = {"macs": {"dense": plan.dense.macs}, "params": {"dense": plan.dense.params}, "widths": _widths(before, step)}
    session.ui.detail(
        f"{len(plan.widths)} groups of coupled channels can shrink; MACs will go from {si(plan.dense.macs)} to about {si(plan.cost.macs)}"
    )
    return plan


def draw(session: Session, settings: Ticket, search: Search, epoch: float) -> dict[str, Any]:
    """The ticket of the network as it is now; the session goes on with the small network."""
    dense, before = session.state.model, search.ticket
    nth = len(before["draws"]) + 1 if before else 1
    if before is None:
        search.fit_into(session, epoch)
    at_draw = session.accuracy("val", dense).top1
    if before is None:
        session.write_model("dense", dense)
    dist.from_rank_0(dense)  # ranks whose batch-norm statistics differ would not draw the same ticket
    plan = _plan(session, settings, nth, search.draws, before)
    if settings.criterion == "taylor":
        images = min(GRADIENT_BATCHES * session.recipe.train.batch_size, session.data.info.n_train)
        session.spent_flops += cost.training_flops(session.macs, images)
    source = _repaired(session, settings, plan) if settings.weights == "inherit" else dense  # else its weights are not kept
    small = compact(source, plan.dropped, session.example())
    counted = check_against_plan(plan, small.module, session.input_shape)
    momentum = carry(momentum_of(dense, session.state.optimizer), small.index)
    weights = _chosen_weights(session, settings, search, plan, small)
    session.steps = [*session.steps, {"dropped": plan.dropped, "epoch": epoch, "criterion": settings.criterion}]
    if session.recipe.train.distill and before is None:
        teach(session, dense)
    adopt(session, weights)
    if settings.weights == "inherit":
        set_momentum(session.state.model, session.state.optimizer, momentum)
    raw = session.accuracy("val", session.state.model).top1
    recalibrated = _recalibrate(session, settings)
    reset_average(session)
    step = f", step {nth} of {search.draws}" if search.draws > 1 else ""
    session.ui.say(
        f"ticket drawn after {epoch:g} epochs by {search.deciding}{step}: {100 * plan.channels_removed:.0f} % of the channels go, "
        f"MACs {si(plan.dense.macs)} -> {si(counted.macs)}; "
        f"validation {at_draw:.2f} % dense, {raw:.2f} % pruned, {recalibrated:.2f} % re-calibrated"
    )
    accuracy = {"dense_at_draw": at_draw, "raw": raw, "bn_recalibrated": recalibrated}
    this = {"epoch": epoch, "macs": counted.macs, "params": counted.params, "accuracy": accuracy}
    if before:
        return _together(before, plan, this)
    return {
        "epoch": epoch,
        "detector": search.deciding,
        "criterion": settings.criterion,
        "scope": settings.scope,
        "repair": settings.repair if settings.weights == "inherit" else "none",
        "weights": settings.weights,
        **plan.to_dict(),
        "params": {"dense": plan.dense.params, "ticket": counted.params},
        "macs": {"dense": plan.dense.macs, "ticket": counted.macs},
        "accuracy": accuracy,
        "draws": [this],
        "members": {g.name: [m.layer for m in g.members] for g in plan.graph.groups},
        "locked": {g.name: g.locked for g in plan.graph.groups if g.locked},
    }


def _together(before: dict[str, Any], plan: TicketPlan, this: dict[str, Any]) -> dict[str, Any]:
    """The record of a ticket after one more draw, told from the dense network: `before`, and what `plan` took of the rest."""
    widths = _widths(before, plan)
    first = {name: width for name, (width, _) in widths.items()}
    dropped = composed(before["dropped"], plan.dropped, first)
    return {
        **before,
        **plan.to_dict(),
        "channels_removed": sum(map(len, dropped.values())) / sum(first.values()),
        "widths": widths,
        "dropped": dropped,
        "params": {**before["params"], "ticket": this["params"]},
        "macs": {**before["macs"], "ticket": this["macs"]},
        "accuracy": {**this["accuracy"], "dense_at_draw": before["accuracy"]["dense_at_draw"]},
        "draws": [*before["draws"], this],
    }


def _widths(before: dict[str, Any] | None, plan: TicketPlan) -> dict[str, list[int]]:
    """Channels of each group in the dense network and after `plan`, which comes on top of what the record `before` tells."""
    known = before["widths"] if before else {}
    return {**known, **{name: [known.get(name, [now])[0], after] for name, (now, after) in plan.widths.items()}}


def _repaired(session: Session, settings: Ticket, plan: TicketPlan) -> nn.Module:
    """A copy of the dense network whose surviving channels stand in for those that will go."""
    source = copy.deepcopy(session.state.model)
    if settings.repair == "merge":
        merge_(source, plan.graph, plan.dropped, rho=settings.rho)
    elif settings.repair == "reconstruct":
        batches = session.data.eval_batches("train", batch_size=REPAIR_BATCH, limit=REPAIR_IMAGES)
        with session.place.autocast():
            seen = reconstruct_(source, plan.graph, plan.dropped, (session.place.images(x) for x, _ in batches))
        session.spent_flops += cost.forward_flops(session.macs, seen)
    return source


def _plan(
    session: Session, settings: Ticket, nth: int, draws: int, before: dict[str, Any] | None = None, model: nn.Module | None = None
) -> TicketPlan:
    """The nth of `draws` draws, from `model`, the session's own unless it is given; before: the record of the draws until then."""
    model = model or session.state.model
    gradients = None
    if settings.criterion == "taylor":
        size = session.recipe.train.batch_size
        batches = session.data.eval_batches("train", batch_size=size, limit=GRADIENT_BATCHES * size)
        gradients = mean_gradients(model, batches, session.place)
    return plan_ticket(
        model,
        session.example(),
        budget=_budget_of_step(settings, draws, nth, before),
        criterion=settings.criterion,
        scope=settings.scope,
        round_to=None if settings.round_to == "auto" else int(settings.round_to),
        keep=settings.keep,
        rho=settings.rho,
        seed=session.recipe.seed,
        gradients=gradients,
        began={name: width for name, (width, _) in before["widths"].items()} if before else None,
    )


def budget_of(settings: Ticket) -> Budget:
    if settings.target_macs is not None:
        return Budget("macs", settings.target_macs)
    if settings.target_params is not None:
        return Budget("params", settings.target_params)
    return Budget("channels", settings.sparsity or 0.5)


def _budget_of_step(settings: Ticket, draws: int, nth: int, before: dict[str, Any] | None) -> Budget:
    """What is to be left of the dense network after the nth draw: the same share of the rest goes each time, roughly.

    Only the last draw has a budget to meet; widths that are multiples from the first draw on leave it multiples to end at."""
    asked = budget_of(settings)
    keeps = asked.keeps ** (nth / draws)
    value = 1 - keeps if asked.metric == "channels" else keeps
    tolerance = ON_THE_WAY * (1 - keeps) / value if nth < draws else asked.tolerance
    if before is None:
        return Budget(asked.metric, value, tolerance=tolerance)
    if asked.metric == "channels":
        widths = before["widths"].values()
        whole, gone = sum(b for b, _ in widths), sum(b - a for b, a in widths)
        return Budget("channels", value, whole=whole, gone=gone, tolerance=tolerance)
    return Budget(asked.metric, value, whole=before[asked.metric]["dense"], tolerance=tolerance)


def _chosen_weights(session: Session, settings: Ticket, search: Search, plan: TicketPlan, small: Compacted) -> nn.Module:
    """The small network with inherited, fresh or rewound weights."""
    if settings.weights == "inherit":
        return small.module
    steps = [*(s["dropped"] for s in session.steps), plan.dropped]
    if settings.weights == "reinit":
        return replay(models.build(**session.arguments, seed=session.recipe.seed + 1), steps, session.example())
    if search.not_before == 0:
        return replay(models.build(**session.arguments, seed=session.recipe.seed), steps, session.example())
    small.module.load_state_dict(carry(search.rewind, {k: i.cpu() for k, i in small.index.items()}))
    return small.module


def _recalibrate(session: Session, settings: Ticket) -> float:
    """Batch norm re-estimated on training images without augmentation; the validation accuracy after it."""
    images = settings.recalibration_batches * RECALIBRATION_BATCH

    def batches() -> Iterator[Tensor]:
        for x, _ in session.data.eval_batches("train", batch_size=RECALIBRATION_BATCH, limit=images):
            yield session.place.images(x)

    with session.place.autocast():
        seen = recalibrate_(session.state.model, batches()) if images else 0
    session.spent_flops += cost.forward_flops(session.macs, seen)
    return session.accuracy("val", session.state.model).top1
