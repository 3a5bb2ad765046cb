"""`prunectl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.cli.options import DataDirOpt, Talk
from prunectl.cli.output import console


def bench(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN|ONNX ...]", help="default runs/latest: its dense and pruned network")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda, jetson or replay:FILE")] = None,
    host: Annotated[str | None, typer.Option(metavar="USER@HOST", help="the board; else $PRUNECTL_JETSON")] = None,
    train: Annotated[bool, typer.Option("--train", help="time training steps too")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="images a call (default: what a file fixes, else 1)")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or int8 (default: fp16 on a board, else fp32)")] = None,
    profile: Annotated[str | None, typer.Option(help="of the exported files (default: what suits the device)")] = None,
    warmup: Annotated[float | None, typer.Option(help="seconds before each window")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds of each window")] = None,
    repeats: Annotated[int | None, typer.Option(help="interleaved windows of each network")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="short windows, labelled so")] = False,
    baseline: Annotated[Path | None, typer.Option(help="what the others are compared with")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: every core allowed)")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="cpu, jetson-tx2, jetson-orin, or a file of your own")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting, e.g. bench.workspace_mb=256 (repeatable)")
    ] = None,
    data_dir: DataDirOpt = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the raw samples, and of what a read-only run cannot take (default: bench/ inside the run)"),
    ] = None,
    *,
    talk: Talk,
) -> None:
    """Measure latency and energy, here or on a board.

    \b
    Example: prunectl bench --device jetson --host nvidia@tx2
    """
    said = {
        "device": device,
        "profile": profile,
        "bench.precision": precision,
        "bench.warmup_s": warmup,
        "bench.duration_s": duration,
        "bench.repeats": repeats,
        "bench.threads": threads,
    }
    ui = console(talk)
    from prunectl.workflows.bench_plan import plan

    given = {k: v for k, v in said.items() if v is not None}
    how = plan(recipe=recipe, host=host, quick=quick, given=given, sets=sets or ())
    from prunectl.workflows import bench as workflow

    request = workflow.Request(paths=tuple(paths or ()), plan=how, train=train, batch=batch, baseline=baseline, data_dir=data_dir, out=out)
    result = workflow.bench(request, ui)
    workflow.show(result, ui)
    ui.result(result)
