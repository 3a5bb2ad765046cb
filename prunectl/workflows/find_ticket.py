"""`prunectl find-ticket`: Algorithm 1 of the spline early-bird paper.

Train the dense network and watch its partition; when it has settled, draw: rank the channels, remove the redundant ones
physically, re-estimate batch norm, carry the momentum over; train the small network to the end of the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunectl import dist
from prunectl.console import Console, si
from prunectl.files import write_csv, write_json
from prunectl.pruning import cost
from prunectl.recipe import Recipe, Ticket
from prunectl.workflows.draw import draw, preflight
from prunectl.workflows.folder import Options, from_disk, run_folder
from prunectl.workflows.search import Search
from prunectl.workflows.session import Session, averaged, begin, enter, fit


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
        if enter(session, search) and search.at_once:
            search.fires_at[search.deciding] = 0.0
            search.ticket = draw(session, settings, search, 0.0)
        if search.ticket and settings.search_only:
            return _finish(session, settings, search)
        for step in fit(session, search, rate_of(session, search, settings.rewarm_epochs)):
            if search.says_draw(session, step):
                search.ticket = draw(session, settings, search, step.done)
                if settings.search_only:
                    break
        return _finish(session, settings, search)


def rate_of(session: Session, search: Search, rewarm_epochs: float) -> Callable[[float], float]:
    """The recipe's learning rate, which after each draw climbs back from 0 over `rewarm_epochs`.

    A freshly cut network at the full rate can throw its weights far out, and behind batch norm large weights learn slowly
    for the rest of the schedule."""

    def rate(done: float) -> float:
        full = session.rate(done)
        if search.ticket is None or not rewarm_epochs:
            return full
        since = done * session.recipe.train.epochs - float(search.ticket["draws"][-1]["epoch"])
        return full * min(1.0, max(0.0, since) / rewarm_epochs)

    return rate


def _finish(session: Session, settings: Ticket, search: Search) -> dict[str, Any]:
    ticket, recipe, run = search.ticket, session.recipe, session.run
    with averaged(session.state):
        session.write_model("compact" if ticket else "dense", session.state.model)
        final = None if settings.search_only and ticket else session.accuracy(recipe.data.final, session.state.model)
    dense_macs = ticket["macs"]["dense"] if ticket else session.macs
    dense_flops = cost.training_flops(dense_macs, session.dense_images)
    points = ticket["accuracy"] if ticket else {"dense_at_draw": None, "raw": None, "bn_recalibrated": None}
    params = cost.parameters(session.state.model)
    if ticket and dist.rank() == 0:
        write_json(run.ticket, ticket)
    if dist.rank() == 0:
        _write_search(session, search)
    deciding = search.record()[search.deciding]["distances"]
    unknown = f"what {recipe.start} cost is not known here" if recipe.start else None
    if ticket and settings.search_only:
        unknown = "--search-only ends at the draw; the ticket's own training is not in it"
    return session.result(
        "found" if ticket else "not-found",
        found_epoch=ticket["epoch"] if ticket else None,
        distances=deciding,
        detectors=search.record(),
        accuracy={
            **points,
            **({"draws": len(ticket["draws"])} if ticket and len(ticket["draws"]) > 1 else {}),
            "final": final.top1 if final else None,
            "final_top5": final.top5 if final else None,
            "split": recipe.data.final,
            **({} if final else {"final_reason": "--search-only ends at the draw; go on with prunectl train --from this run"}),
            **({} if ticket else {"reason": _why_none(session, search)}),
        },
        params=ticket["params"] if ticket else {"dense": params, "ticket": None},
        macs=ticket["macs"] if ticket else {"dense": session.macs, "ticket": None},
        training_flops={
            "spent": session.spent_flops,
            "dense": dense_flops,
            "ratio": session.spent_flops / dense_flops if dense_flops and not unknown else None,
            **({"reason": unknown} if unknown else {}),
        },
        ticket="ticket.json" if ticket else None,
        compact="compact" if ticket else None,
        dense="dense",
    )


def _why_none(session: Session, search: Search) -> str:
    name, epochs = search.deciding, session.recipe.train.epochs
    at, seen = search.fires_at.get(name), search.readings[name]
    if at is not None and seen[-1].fires:
        return f"the {name} detector fired only at the end of {epochs} epochs, with nothing left to train a ticket; train for longer"
    if at is not None:
        return (
            f"the {name} detector fired after {at:g} epochs, before the weights to go back to, and not again in {epochs};"
            " rewind to an earlier epoch"
        )
    return f"the {name} detector did not fire in {epochs} epochs{search.how_near()}; try a larger --eps, or --detector epoch:N"


def _write_search(session: Session, search: Search) -> None:
    """What the detectors read, how far any two partitions of the search lie apart, and both as a picture."""
    from prunectl.report.search import plot_search

    path, recipe, trail = session.run.path, session.recipe, search.trail
    rows = [{"detector": n, "epoch": r.epoch, "max": r.max, "to": list(r.distances)} for n, seen in search.readings.items() for r in seen]
    write_csv(path / "probes.csv", rows)
    matrix = trail.matrix()
    write_json(path / "probes.json", {**search.record(), "matrix": {"epochs": trail.epochs, "distances": matrix}})
    write_csv(
        path / "distances.csv",
        [{"epoch": e, **dict(zip(map(str, trail.epochs), row, strict=True))} for e, row in zip(trail.epochs, matrix, strict=True)],
    )
    drawn = search.ticket["epoch"] if search.ticket else None
    title = f"{recipe.model.name} on {recipe.data.name}"
    plot_search(path / "search.png", search.record(), trail.epochs, matrix, drawn=drawn, eps=search.eps, title=title)


def show(result: dict[str, Any], ui: Console) -> None:
    a, found = result["accuracy"], result["outcome"] == "found"
    several = a.get("draws", 1) > 1
    ui.table(
        f"{result['model']} on {result['dataset']}",
        ["", "start" if result.get("start") else "dense", "ticket"],
        [
            [f"validation at the {'first ' if several else ''}draw, %", _two(a["dense_at_draw"]), None],
            [f"  right after {'the last ' if several else ''}pruning, %", None, _two(a["raw"])],
            ["  batch norm re-calibrated, %", None, _two(a["bn_recalibrated"])],
            [f"{a['split']} after training on, %", None if found else _two(a["final"]), _two(a["final"]) if found else None],
            ["parameters", si(result["params"]["dense"]), si(result["params"]["ticket"]) if found else None],
            ["MACs an image", si(result["macs"]["dense"]), si(result["macs"]["ticket"]) if found else None],
            ["training FLOPs", si(result["training_flops"]["dense"]), si(result["training_flops"]["spent"])],
        ],
    )
    if found:
        saved = result["training_flops"]["ratio"]
        ui.say(f"ticket found after {result['found_epoch']:g} epochs; training cost {saved:.2f} of dense" if saved else "ticket found")
    else:
        say = ui.error if ui.verbosity < 0 and dist.rank() == 0 else ui.say  # of several processes, one speaks
        say(f"no ticket, and the dense network was trained to the end: {a['reason']}")
    ui.say(f"run: {result['run']}")


def _two(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
