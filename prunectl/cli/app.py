"""The program `prunectl`: its verbs and its help."""

from __future__ import annotations

from typing import Annotated

import typer

from prunectl import __version__
from prunectl.cli.bench import bench
from prunectl.cli.export import export
from prunectl.cli.find_ticket import find_ticket
from prunectl.cli.look import demo, list_, show
from prunectl.cli.options import spread
from prunectl.cli.sfw_prune import sfw_prune
from prunectl.cli.train import train

VERBS = (train, find_ticket, sfw_prune, export, bench, list_, show, demo)

app = typer.Typer(
    name="prunectl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From data set to pruned, verified, measured image classifier on an edge board.\n\n"
    "Start with `prunectl demo`, or `prunectl find-ticket resnet8 fashion-mini`.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunectl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and stop", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


for verb in VERBS:
    app.command(verb.__name__.strip("_").replace("_", "-"))(spread(verb))
