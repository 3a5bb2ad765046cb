"""`prunectl sfw-prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from prunectl.cli.names import completion
from prunectl.cli.options import DataArg, ModelArg, StartOpt, Talk, Training
from prunectl.cli.output import console
from prunectl.cli.training import carry_out, only_looked_at, settings_of


def sfw_prune(
    model: ModelArg,
    dataset: DataArg,
    constraint: Annotated[
        str | None,
        typer.Option(
            help="set the weights stay in: see `prunectl list constraints`; none trains by SGD (default nm)",
            autocompletion=completion("constraints"),
        ),
    ] = None,
    k_fraction: Annotated[
        float | None, typer.Option(help="share of a tensor's entries in a vertex (default 0.05; group-k-support: filters, 0.25)")
    ] = None,
    tau: Annotated[float | None, typer.Option(help="diameter of every set in twice the tensor's first norm (default 15)")] = None,
    n: Annotated[int | None, typer.Option(help="of N:M (default 2); given, the accuracy at N:M is measured")] = None,
    m: Annotated[int | None, typer.Option(help="of N:M (default 4); given, the accuracy at N:M is measured")] = None,
    sfw_init: Annotated[bool | None, typer.Option("--sfw-init", help="learn a scale for every tensor first")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="share of weights removed (repeatable; default 18 shares, 0.1 to 0.99)")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="what is ranked: weights (default), or all parameters as published")] = None,
    bn_recal: Annotated[int | None, typer.Option(metavar="N", help="batches of 100 images for batch norm (default 100, 0: none)")] = None,
    start: StartOpt = None,
    *,
    given: Training,
    talk: Talk,
) -> None:
    """Train once, prune to any sparsity.

    \b
    Example: prunectl sfw-prune resnet18 fashion-mnist --constraint nm --sparsity 0.5 --sparsity 0.9
    """
    own = {
        "start": start,
        "sfw.constraint": constraint,
        "sfw.k_fraction": k_fraction,
        "sfw.tau": tau,
        "sfw.n": n,
        "sfw.m": m,
        "sfw.sfw_init": sfw_init,
        "sfw.sparsity": sparsity or None,
        "sfw.scope": scope,
        "sfw.bn_recal": bn_recal,
    }
    settings, ui = settings_of("sfw-prune", model, dataset, given, own), console(talk)
    if only_looked_at(settings, given, ui):
        return
    from prunectl.workflows import sfw_prune as workflow

    carry_out(workflow.sfw_prune, workflow.show, settings, given, ui)
