"""`prunectl find-ticket`: Algorithm 1 of the spline early-bird paper.

Train the dense network and watch its partition; when it has settled, draw: rank the channels, remove the redundant ones
physically, re-estimate batch norm, carry the momentum over; train the small network to the end of the schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from prunectl import dist, models
from prunectl.console import Console, si
from prunectl.files import write_csv, write_json
from prunectl.pruning import cost
from prunectl.pruning.budget import Budget
from prunectl.pruning.merge import merge_
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.pruning.reconstruct import reconstruct_
from prunectl.pruning.surgery import Compacted, carry, compact, replay
from prunectl.pruning.ticket import TicketPlan, check_against_plan, plan_ticket
from prunectl.recipe import Recipe, Ticket
from prunectl.training.gradients import mean_gradients
from prunectl.training.optimizers import momentum_of, set_momentum
from prunectl.workflows.search import Search
from prunectl.workflows.session import Options, Session, adopt, averaged, begin, fit, from_disk, reset_average, run_folder

GRADIENT_BATCHES = 20
RECALIBRATION_BATCH = 100
REPAIR_IMAGES, REPAIR_BATCH = 512, 64


def find_ticket(recipe: Recipe, options: Options | None = None, ui: Console | None = None) -> dict[str, Any]:
    """Searches, draws, trains on, and returns the result; a finished run answers from disk."""
    options, ui = options or Options(), ui or Console(verbosity=-1)
    with run_folder(recipe, options) as run:
        if run.finished:
            return from_disk(run, ui)
        session = begin(recipe, run, options, ui)
        settings = recipe.ticket or Ticket()
        preflight(session, settings)
        search = Search.of(session, settings)
        for step in fit(session, search):
            if search.ticket is None and search.due(step) and search.look(session, step):
                search.ticket = draw(session, settings, search, step.done)
                if settings.search_only:
                    break
        return _finish(session, settings, search)


def preflight(session: Session, settings: Ticket) -> TicketPlan:
    """The plan that the untrained network would get: refuses before training what could only be refused after it."""
    plan = _plan(session, settings)
    session.ui.detail(
        f"{len(plan.widths)} groups of coupled channels can shrink; MACs will go from {si(plan.dense.macs)} to about {si(plan.cost.macs)}"
    )
    return plan


def draw(session: Session, settings: Ticket, search: Search, epoch: float) -> dict[str, Any]:
    """The ticket of the network as it is now; the session goes on with the small network."""
    dense = session.state.model
    at_draw = session.accuracy("val", dense).top1
    session.write_model("dense", dense)
    plan = _plan(session, settings)
    source = _repaired(session, settings, plan)
    small = compact(source, plan.dropped, session.example())
    counted = check_against_plan(plan, small.module, session.input_shape)
    momentum = carry(momentum_of(dense, session.state.optimizer), small.index)
    weights = _chosen_weights(session, settings, search, plan, small)
    session.steps = [*session.steps, {"dropped": plan.dropped, "epoch": epoch, "criterion": settings.criterion}]
    session.state.teacher = dense.eval() if session.recipe.train.distill else None
    adopt(session, weights)
    if settings.weights == "inherit":
        set_momentum(session.state.model, session.state.optimizer, momentum)
    raw = session.accuracy("val", session.state.model).top1
    recalibrated = _recalibrate(session, settings)
    reset_average(session)
    session.ui.say(
        f"ticket drawn after {epoch:g} epochs by {search.deciding}: {100 * plan.channels_removed:.0f} % of the channels go, "
        f"MACs {si(plan.dense.macs)} -> {si(counted.macs)}; "
        f"validation {at_draw:.2f} % dense, {raw:.2f} % pruned, {recalibrated:.2f} % re-calibrated"
    )
    return {
        "epoch": epoch,
        "detector": search.deciding,
        "criterion": settings.criterion,
        "scope": settings.scope,
        "repair": settings.repair,
        "weights": settings.weights,
        **plan.to_dict(),
        "params": {"dense": plan.dense.params, "ticket": counted.params},
        "macs": {"dense": plan.dense.macs, "ticket": counted.macs},
        "accuracy": {"dense_at_draw": at_draw, "raw": raw, "bn_recalibrated": recalibrated},
        "members": {g.name: [m.layer for m in g.members] for g in plan.graph.groups},
        "locked": {g.name: g.locked for g in plan.graph.groups if g.locked},
    }


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


def _plan(session: Session, settings: Ticket) -> TicketPlan:
    gradients = None
    if settings.criterion == "taylor":
        batches = session.data.eval_batches("train", batch_size=session.recipe.train.batch_size)
        gradients = mean_gradients(session.state.model, islice(batches, GRADIENT_BATCHES), session.place)
    return plan_ticket(
        session.state.model,
        session.example(),
        budget=budget_of(settings),
        criterion=settings.criterion,
        scope=settings.scope,
        round_to=None if settings.round_to == "auto" else int(settings.round_to),
        keep=settings.keep,
        rho=settings.rho,
        seed=session.recipe.seed,
        gradients=gradients,
    )


def budget_of(settings: Ticket) -> Budget:
    if settings.target_macs is not None:
        return Budget("macs", settings.target_macs)
    if settings.target_params is not None:
        return Budget("params", settings.target_params)
    return Budget("channels", settings.sparsity or 0.5)


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


def _finish(session: Session, settings: Ticket, search: Search) -> dict[str, Any]:
    ticket, recipe, run = search.ticket, session.recipe, session.run
    probes = [{"detector": n, "epoch": r.epoch, "max": r.max, "to": list(r.distances)} for n, rows in search.readings.items() for r in rows]
    if dist.rank() == 0:
        write_csv(run.path / "probes.csv", probes)
        write_json(run.path / "probes.json", search.record())
    with averaged(session.state):
        session.write_model("compact" if ticket else "dense", session.state.model)
        final = None if settings.search_only and ticket else session.accuracy("test", session.state.model)
    dense_macs = ticket["macs"]["dense"] if ticket else session.macs
    dense_flops = cost.training_flops(dense_macs, session.dense_images)
    points = ticket["accuracy"] if ticket else {"dense_at_draw": None, "raw": None, "bn_recalibrated": None}
    params = cost.parameters(session.state.model)
    if ticket and dist.rank() == 0:
        write_json(run.ticket, ticket)
    deciding = search.record()[search.deciding]["distances"]
    return session.result(
        "found" if ticket else "not-found",
        found_epoch=ticket["epoch"] if ticket else None,
        distances=deciding,
        detectors=search.record(),
        accuracy={
            **points,
            "final": final.top1 if final else None,
            "final_top5": final.top5 if final else None,
            **({} if final else {"final_reason": "--search-only ends at the draw; go on with prunectl train --from this run"}),
            **({} if ticket else {"reason": f"the {search.deciding} detector did not fire in {recipe.train.epochs} epochs"}),
        },
        params=ticket["params"] if ticket else {"dense": params, "ticket": None},
        macs=ticket["macs"] if ticket else {"dense": session.macs, "ticket": None},
        training_flops={
            "spent": session.spent_flops,
            "dense": dense_flops,
            "ratio": session.spent_flops / dense_flops if dense_flops else None,
        },
        ticket="ticket.json" if ticket else None,
        compact="compact" if ticket else None,
        dense="dense",
    )


def show(result: dict[str, Any], ui: Console) -> None:
    a, found = result["accuracy"], result["outcome"] == "found"
    ui.table(
        f"{result['model']} on {result['dataset']}",
        ["", "dense", "ticket"],
        [
            ["validation at the draw, %", _two(a["dense_at_draw"]), None],
            ["  right after pruning, %", None, _two(a["raw"])],
            ["  batch norm re-calibrated, %", None, _two(a["bn_recalibrated"])],
            ["test after training on, %", None if found else _two(a["final"]), _two(a["final"]) if found else None],
            ["parameters", si(result["params"]["dense"]), si(result["params"]["ticket"]) if found else None],
            ["MACs an image", si(result["macs"]["dense"]), si(result["macs"]["ticket"]) if found else None],
            ["training FLOPs", si(result["training_flops"]["dense"]), si(result["training_flops"]["spent"])],
        ],
    )
    if found:
        saved = result["training_flops"]["ratio"]
        ui.say(f"ticket found after {result['found_epoch']:g} epochs; training cost {saved:.2f} of dense" if saved else "ticket found")
    else:
        ui.say(f"no ticket: {a['reason']}; the dense network was trained to the end. Try a larger --eps, or --detector epoch:N")
    ui.say(f"run: {result['run']}")


def _two(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
