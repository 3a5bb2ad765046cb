"""`prunectl find-ticket`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.cli.names import completion
from prunectl.cli.options import DataArg, ModelArg, Talk, Training
from prunectl.cli.output import console
from prunectl.cli.training import carry_out, only_looked_at, settings_of
from prunectl.errors import ExitStatus, UsageError


def find_ticket(
    model: ModelArg,
    dataset: DataArg,
    sparsity: Annotated[float | None, typer.Option(help="share to remove, of the channels that may go (default 0.5)")] = None,
    target_macs: Annotated[float | None, typer.Option(help="share of dense MACs kept")] = None,
    target_params: Annotated[float | None, typer.Option(help="share of dense parameters kept")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="which channels go (default obs): see `list criteria`", autocompletion=completion("criteria"))
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="when: spline (default: by itself, after a quarter of the schedule at the latest), early-bird, epi or epoch:N",
            autocompletion=completion("detectors"),
        ),
    ] = None,
    scope: Annotated[str | None, typer.Option(help="layerwise or global (default layerwise)")] = None,
    eps: Annotated[
        float | None, typer.Option(help="distance below which it counts as settled (default by detector: 0.16, early-bird 0.1, epi 0.017)")
    ] = None,
    window: Annotated[int | None, typer.Option(help="how many past looks must be that near (default 3; early-bird and epi 5)")] = None,
    probe: Annotated[str | None, typer.Option(help="batch (training images, default) or canvas (a plane through two)")] = None,
    weights: Annotated[str | None, typer.Option(help="inherit (default), reinit or rewind:E")] = None,
    repair: Annotated[str | None, typer.Option(help="what stands in for removed channels: none, merge or reconstruct (default)")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="the same as --repair merge")] = False,
    round_to: Annotated[str | None, typer.Option(help="auto (default), or a multiple for every width")] = None,
    keep: Annotated[str | None, typer.Option(metavar="REGEX", help="layers that keep all channels")] = None,
    search_only: Annotated[bool | None, typer.Option("--search-only", help="stop after the draw")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="prune a saved network; --detector epoch:0 draws from it as it is")
    ] = None,
    *,
    given: Training,
    talk: Talk,
) -> None:
    """Draw an early ticket: search, prune, train on.

    \b
    Example: prunectl find-ticket resnet50 imagenet --data-dir /data --target-macs 0.3
    """
    if merge and repair not in (None, "merge"):
        raise UsageError(f"--merge is --repair merge, and --repair {repair} is given: leave one of them out")
    own = {
        "start": start,
        "ticket.sparsity": sparsity,
        "ticket.target_macs": target_macs,
        "ticket.target_params": target_params,
        "ticket.criterion": criterion,
        "ticket.detector": detector,
        "ticket.scope": scope,
        "ticket.eps": eps,
        "ticket.window": window,
        "ticket.probe": probe,
        "ticket.weights": weights,
        "ticket.repair": "merge" if merge else repair,
        "ticket.round_to": int(round_to) if round_to and round_to.removeprefix("-").isdecimal() else round_to,
        "ticket.keep": keep,
        "ticket.search_only": search_only,
    }
    settings, ui = settings_of("find-ticket", model, dataset, given, own), console(talk)
    if only_looked_at(settings, given, ui):
        return
    from prunectl.workflows import find_ticket as workflow

    result = carry_out(workflow.find_ticket, workflow.show, settings, given, ui)
    if result["outcome"] == "not-found":
        raise typer.Exit(ExitStatus.UNSATISFIABLE)
