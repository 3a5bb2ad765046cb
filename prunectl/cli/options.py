"""What several verbs take: arguments, and records of options that a verb's signature names once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.cli.names import completion

LATEST = Path("runs/latest")
MODEL_HELP = "a registered, torchvision or timm/NAME network, or file.py:function"
DATA_HELP = "a registered data set, or a folder with train/ and val/"
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=completion("models"))]
DataArg = Annotated[str, typer.Argument(metavar="DATASET", help=DATA_HELP, autocompletion=completion("datasets"))]
StartOpt = Annotated[Path | None, typer.Option("--from", metavar="RUN", help="start from a ticket or a saved network")]
DataDirOpt = Annotated[Path | None, typer.Option("--data-dir", help="where data sets lie; else $PRUNECTL_DATA, else ~/.cache/prunectl")]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
OutOpt = Annotated[Path, typer.Option("--out", help="folder of the runs")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="start again, throwing the folder's run away")]


@dataclass(frozen=True)
class Training:
    """What every verb that trains takes."""

    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="settings; default: the shipped recipe, else defaults")] = None
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting, e.g. train.lr=0.05 (repeatable)")
    ] = None
    epochs: Annotated[int | None, typer.Option(help="length of the schedule (default: the recipe's)")] = None
    seed: Annotated[int | None, typer.Option(help="of weights, order and augmentation (default 0)")] = None
    device: DeviceOpt = "auto"
    precision: Annotated[str | None, typer.Option(help="auto (default), fp32, bf16 or fp16")] = None
    data_dir: DataDirOpt = None
    out: OutOpt = Path("runs")
    workers: Annotated[int | None, typer.Option(help="processes that read image files")] = None
    resume: Annotated[bool, typer.Option("--resume", help="go on with an unfinished run")] = False
    overwrite: OverwriteOpt = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would happen; write nothing")] = False
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="print the resolved settings as YAML and stop")] = False


@dataclass(frozen=True)
class Talk:
    """How a verb speaks."""

    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, all else on stderr")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="errors and warnings only")] = False
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="say more")] = 0
    no_progress: Annotated[bool, typer.Option("--no-progress", help="no progress bars")] = False


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer should see it: with the fields of each record in its signature in the record's place."""
    signature = inspect.signature(verb, eval_str=True)
    records: dict[str, Any] = {name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)}

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        own = {name: record(**{f.name: given.pop(f.name) for f in fields(record)}) for name, record in records.items()}
        verb(**given, **own)

    shown = [p for name, p in signature.parameters.items() if name not in records]
    for record in records.values():
        shown += inspect.signature(record, eval_str=True).parameters.values()
    seen = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    command.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in seen}
    return command
