"""The draw: rank the channels, remove the redundant ones for good, and put the small network in the dense one's place.

A ticket may be drawn in several steps, each on the network that the step before has left and trained on; what is
recorded is the whole way from the dense network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prunectl import dist, models
from prunectl.console import si
from prunectl.errors import Unsatisfiable
from prunectl.pruning import cost
from prunectl.pruning.budget import Budget
from prunectl.pruning.copying import copied
from prunectl.pruning.merge import merge_
from prunectl.pruning.moments import covariances
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgery import Compacted, Dense, analyse, carry, compact, replay
from prunectl.pruning.ticket import AUTO_ROUNDS, TicketPlan, check_against_plan, composed, plan_ticket
from prunectl.recipe import Ticket
from prunectl.training.gradients import mean_gradients
from prunectl.training.loop import TrainState
from prunectl.training.optimizers import momentum_of, set_momentum
from prunectl.workflows.search import Search
from prunectl.workflows.session import Session, adopt, averaged, reset_average, teach

GRADIENT_BATCHES = 20
RECALIBRATION_BATCH = 100
REPAIR_IMAGES, REPAIR_BATCH = 512, 64


def preflight(session: Session, settings: Ticket) -> TicketPlan:
    """The plan that the untrained network would get: refuses before training what could only be refused after it."""
    plan = _plan(session, _unseeing(settings), 1, 1)
    if settings.draws > 1:
        _rehearse(session, settings, settings.draws)
    session.ui.detail(
        f"{len(plan.widths)} groups of coupled channels can shrink; MACs will go from {si(plan.dense.macs)} to about {si(plan.cost.macs)}"
    )
    return plan


def draw(session: Session, settings: Ticket, search: Search, epoch: float) -> dict[str, Any]:
    """The ticket of the network as it is now; the session goes on with the small network."""
    dense, before = session.state.model, search.ticket
    if before is None:
        search.fit_into(session, epoch)
        _settle_on_a_number(session, settings, search)
    dist.from_rank_0(dense)  # ranks whose batch-norm statistics differ would not draw the same ticket
    dist.tensors_of_rank_0((session.state.average or {}).values())
    at_draw = session.accuracy("val").top1
    if before is None:
        with averaged(session.state):
            session.write_model("dense", dense)
    nth, plan = _next(session, settings, search.drawn + 1, search.draws, before)
    if settings.criterion == "taylor":
        images = min(GRADIENT_BATCHES * session.recipe.train.batch_size, session.data.info.n_train)
        session.spent_flops += cost.training_flops(session.macs, images)
    elif settings.criterion == "obs":
        session.spent_flops += cost.forward_flops(session.macs, min(REPAIR_IMAGES, session.data.info.n_train))
    source = _repaired(session, settings, plan) if settings.weights == "inherit" else dense  # else its weights are not kept
    small = compact(source, plan.dropped, session.example())
    counted = check_against_plan(plan, small.module, session.input_shape)
    momentum = carry(momentum_of(dense, session.state.optimizer), small.index)
    lag = carry(_lag(session.state), small.index)
    weights = _chosen_weights(session, settings, search, plan, small)
    session.steps = [*session.steps, {"dropped": plan.dropped, "epoch": epoch, "criterion": settings.criterion}]
    if session.recipe.train.distill and before is None:
        dense.load_state_dict(session.state.average or dense.state_dict())  # what is saved as dense/, and a resumed run is taught by
        teach(session, dense)
    adopt(session, weights)
    if settings.weights == "inherit":
        set_momentum(session.state.model, session.state.optimizer, momentum)
        for name, behind in lag.items():
            (session.state.average or {})[name] += behind
    raw = session.accuracy("val").top1
    recalibrated = _recalibrated(session, settings)
    by = f" by {search.deciding}" if search.deciding in search.fires_at else ""
    what = f"ticket drawn after {epoch:g} epochs{by}" if before is None else f"ticket cut further after {epoch:g} epochs"
    step = f", step {nth} of {search.draws}" if search.draws > 1 else ""
    if nth == search.draws:
        _warn_of_odd_widths(session, settings, plan)
    session.ui.say(
        f"{what}{step}: {100 * plan.channels_removed:.0f} % of the {'' if before is None else 'remaining '}channels go, "
        f"MACs {si(plan.dense.macs)} -> {si(counted.macs)} ({si(plan.exact.macs)} before widths were rounded to {plan.round_to}); "
        f"validation {at_draw:.2f} % {'dense' if before is None else 'before'}, {raw:.2f} % pruned, {recalibrated:.2f} % re-calibrated"
    )
    after = {"raw": raw, "bn_recalibrated": recalibrated}
    this = {"nth": nth, "epoch": epoch, "macs": counted.macs, "params": counted.params, "accuracy": {"before": at_draw, **after}}
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
        "accuracy": {"dense_at_draw": at_draw, **after},
        "draws": [this],
        "members": {g.name: [m.layer for m in g.members] for g in plan.graph.groups},
        "readers": {g.name: [m.layer for m in g.members if not m.out] for g in plan.graph.groups},
        "producers": {g.name: [p for p in g.producers if isinstance(dense.get_submodule(p), Dense)] for g in plan.graph.groups},
    }


def _warn_of_odd_widths(session: Session, settings: Ticket, plan: TicketPlan) -> None:
    if settings.round_to == "auto" and plan.round_to < AUTO_ROUNDS[0]:
        session.ui.warn(
            f"this budget is met only with widths in multiples of {plan.round_to}, and engines pad widths that are no multiple of "
            f"{AUTO_ROUNDS[0]}: measure the ticket with prunectl bench, or see with --round-to {AUTO_ROUNDS[0]} --dry-run what can be had"
        )


def _unseeing(settings: Ticket) -> Ticket:
    """Without a look at images: gradients and covariances of networks that will never be are not worth their price."""
    return settings.model_copy(update={"criterion": "l2"}) if settings.criterion in ("taylor", "obs") else settings


def _rehearse(session: Session, settings: Ticket, draws: int) -> None:
    """All draws in turn from the network as it is, untrained in between. Raises Unsatisfiable where the last cannot meet the budget.

    With layerwise scope the widths are those of the real draws, whatever the scores; with global scope they are near them."""
    settings = _unseeing(settings)
    model, before, nth = session.state.model, None, 0
    while nth < draws:
        nth, plan = _next(session, settings, nth + 1, draws, before, model)
        model = compact(model, plan.dropped, session.example()).module
        dense = before or {"macs": {"dense": plan.dense.macs}, "params": {"dense": plan.dense.params}}
        before = {**dense, "widths": _widths(before, plan)}


def _settle_on_a_number(session: Session, settings: Ticket, search: Search) -> None:
    """As many draws as can meet the budget from this network; after hours of search is no time to refuse."""
    asked = search.draws
    while search.draws > 1:
        try:
            _rehearse(session, settings, search.draws)
            break
        except Unsatisfiable:
            search.draws -= 1
    if search.draws < asked:
        session.ui.warn(f"{asked} draws from here cannot meet the budget; it is met in {search.draws}")


def _next(
    session: Session, settings: Ticket, nth: int, draws: int, before: dict[str, Any] | None, model: nn.Module | None = None
) -> tuple[int, TicketPlan]:
    """The nth draw, or the next one whose share can be had: which it is, and its plan."""
    seen = _seen(session, settings, model or session.state.model)
    while True:
        try:
            return nth, _plan(session, settings, nth, draws, before, model, seen)
        except Unsatisfiable:
            if nth == draws:
                raise
        nth += 1


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
        "accuracy": {"dense_at_draw": before["accuracy"]["dense_at_draw"], **{k: this["accuracy"][k] for k in ("raw", "bn_recalibrated")}},
        "draws": [*before["draws"], this],
    }


def _widths(before: dict[str, Any] | None, plan: TicketPlan) -> dict[str, list[int]]:
    """Channels of each group in the dense network and after `plan`, which comes on top of what the record `before` tells."""
    known = before["widths"] if before else {}
    return {**known, **{name: [known.get(name, [now])[0], after] for name, (now, after) in plan.widths.items()}}


def _repaired(session: Session, settings: Ticket, plan: TicketPlan) -> nn.Module:
    """A copy of the dense network whose surviving channels stand in for those that will go."""
    source = copied(session.state.model)
    if settings.repair == "merge":
        merge_(source, plan.graph, plan.dropped, rho=settings.rho)
    elif settings.repair == "reconstruct":
        batches = session.data.eval_batches("train", batch_size=REPAIR_BATCH, limit=REPAIR_IMAGES)
        with session.place.autocast():
            seen = reconstruct_(source, plan.graph, plan.dropped, (session.place.images(x) for x, _ in batches))
        session.spent_flops += cost.forward_flops(session.macs, seen)
    return source


def _seen(session: Session, settings: Ticket, model: nn.Module) -> dict[str, Any]:
    """What the criterion wants to know of training images, as `plan_ticket` takes it. GPUs may differ in the last bits, and channels
    go by their rank, so that every process takes that of the first."""
    if settings.criterion == "taylor":
        size = session.recipe.train.batch_size
        batches = session.data.eval_batches("train", batch_size=size, limit=GRADIENT_BATCHES * size)
        gradients = mean_gradients(model, batches, session.place)
        dist.tensors_of_rank_0(gradients.values())
        return {"gradients": gradients}
    if settings.criterion == "obs":
        graph = analyse(model, session.example())  # as the plan does it: not in half precision, where some networks cannot be traced
        with session.place.autocast():
            images = session.data.eval_batches("train", batch_size=REPAIR_BATCH, limit=REPAIR_IMAGES)
            measured = covariances(model, graph, (session.place.images(x) for x, _ in images))
        dist.tensors_of_rank_0(c for group in measured.values() for c in group)
        return {"covariances": measured}
    return {}


def _plan(
    session: Session,
    settings: Ticket,
    nth: int,
    draws: int,
    before: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    seen: dict[str, Any] | None = None,
) -> TicketPlan:
    """The nth of `draws` draws, from `model`, the session's own unless it is given; before: the record of the draws until then."""
    model = model or session.state.model
    return plan_ticket(
        model,
        session.example(),
        budget=_budget_of_step(settings, draws, nth, before),
        criterion=settings.criterion,
        scope=settings.scope,
        pooling=settings.pooling,
        round_to=None if settings.round_to == "auto" else int(settings.round_to),
        keep=settings.keep,
        rho=settings.rho,
        seed=session.recipe.seed,
        **(seen or {}),
        began={name: width for name, (width, _) in before["widths"].items()} if before else None,
    )


def budget_of(settings: Ticket) -> Budget:
    if settings.target_macs is not None:
        return Budget("macs", settings.target_macs)
    if settings.target_params is not None:
        return Budget("params", settings.target_params)
    return Budget("channels", settings.sparsity or 0.5)


def _budget_of_step(settings: Ticket, draws: int, nth: int, before: dict[str, Any] | None) -> Budget:
    """What is to be left of the dense network after the nth draw: the same share of the rest goes each time.

    Only the last draw has the budget to meet; one before it need only come nearer to its share than to the next one's."""
    asked = budget_of(settings)
    keeps, then = (asked.keeps ** (n / draws) for n in (nth, nth + 1))
    value = asked.value if nth == draws else 1 - keeps if asked.metric == "channels" else keeps
    tolerance = (keeps - then) / 2 / value if nth < draws else asked.tolerance
    if before is None:
        return Budget(asked.metric, value, tolerance=tolerance)
    if asked.metric == "channels":
        widths = before["widths"].values()
        whole, gone = sum(b for b, _ in widths), sum(b - a for b, a in widths)
        return Budget("channels", value, whole=whole, gone=gone, tolerance=tolerance)
    return Budget(asked.metric, value, whole=before[asked.metric]["dense"], tolerance=tolerance)


def _lag(state: TrainState) -> dict[str, Tensor]:
    """How far the average of the network's weights and statistics is from them, where one is kept: what the small one's begins with."""
    now = state.model.state_dict() if state.average else {}
    return {name: (state.average or {})[name] - t for name, t in now.items() if t.is_floating_point()}


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


def _recalibrated(session: Session, settings: Ticket) -> float:
    """Validation accuracy with batch norm re-estimated; an average of the weights, which is what is evaluated and saved, gets its own."""
    accuracy = _recalibrate(session, settings)
    if settings.weights != "inherit" or session.state.average is None:
        reset_average(session)
        session.state.averaged_steps = 0
        return accuracy
    with averaged(session.state):
        accuracy = _recalibrate(session, settings)
        reset_average(session)
    return accuracy


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
