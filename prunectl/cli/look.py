"""`prunectl list`, `show` and `demo`: what there is, what a run is, and what a whole one looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.cli.names import KINDS, entries
from prunectl.cli.options import LATEST, DeviceOpt, OutOpt, OverwriteOpt, Talk, Training
from prunectl.cli.output import console
from prunectl.cli.training import options_of
from prunectl.errors import ExitStatus, UnknownName


def list_(kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(KINDS))] = None, *, talk: Talk) -> None:
    """List everything that can be named.

    \b
    Example: prunectl list criteria
    """
    if kind is not None and kind not in KINDS:
        raise UnknownName("list", kind, KINDS)
    found = {k: entries(k) for k in ([kind] if kind else KINDS)}
    if talk.json:
        console(talk).result({"verb": "list", "outcome": "listed", **found})
        return
    for name, known in found.items():
        typer.echo(f"{name}:")
        width = max(map(len, known), default=0)
        for entry, text in known.items():
            typer.echo(f"  {entry:<{width}}  {text}")
    if kind in (None, "models"):
        typer.echo("Any torchvision classification network works too, as do timm/NAME and file.py:function.")


def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run, or a folder with plan.json")] = LATEST,
    why: Annotated[str | None, typer.Option(metavar="LAYER", help="why this layer has its width")] = None,
    *,
    talk: Talk,
) -> None:
    """Show a run's widths before and after.

    \b
    Example: prunectl show runs/latest --why layer3.0.conv1
    """
    ui = console(talk)
    from prunectl.workflows import show as workflow

    ui.result(workflow.show(path, ui, why=why))


def demo(out: OutOpt = Path("runs"), device: DeviceOpt = "auto", overwrite: OverwriteOpt = False, *, talk: Talk) -> None:
    """Run the whole loop, in minutes, offline.

    The embedded data set is trained on, pruned, exported and measured here.

    \b
    Example: prunectl demo
    """
    ui = console(talk)
    from prunectl.workflows import demo as workflow

    result = workflow.demo(options_of(Training(out=out, device=device, overwrite=overwrite)), ui)
    workflow.show(result, ui, out)
    ui.result(result)
    if result["outcome"] == "not-found":
        raise typer.Exit(ExitStatus.UNSATISFIABLE)
