"""`prunectl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.cli.names import completion
from prunectl.cli.options import LATEST, DataDirOpt, Talk
from prunectl.cli.output import console
from prunectl.errors import ExitStatus, UsageError


def export(
    path: Annotated[Path, typer.Argument(metavar="[RUN]", help="a run, or a folder with plan.json")] = LATEST,
    profile: Annotated[
        str | None,
        typer.Option(
            help="cpu, gpu, orin, tx2 or rtx (default cpu; with --trt what fits the builder)", autocompletion=completion("profiles")
        ),
    ] = None,
    trt: Annotated[bool, typer.Option("--trt", help="build a TensorRT engine too")] = False,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8")] = "fp32",
    sparsity: Annotated[
        str | None,
        typer.Option(help="prune once first: a share of the weights such as 0.9, or 2:4 with --profile gpu, orin or rtx"),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="USER@HOST", help="the board that builds the engine; implies --trt")] = None,
    batch: Annotated[int | None, typer.Option(help="images a call (default 1)")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="any number of images a call")] = False,
    uint8_input: Annotated[bool, typer.Option("--uint8-input", help="normalisation inside the graph: feed pixels")] = False,
    lint_only: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="check any ONNX file and stop")] = None,
    data_dir: DataDirOpt = None,
    out: Annotated[Path | None, typer.Option(help="folder of the files (default: inside the run)")] = None,
    *,
    talk: Talk,
) -> None:
    """Write ONNX files, proven equal to the network, and TensorRT engines from them.

    \b
    Example: prunectl export runs/latest --profile tx2 --trt
    """
    ui = console(talk)
    from prunectl.workflows import export as workflow

    if lint_only is not None:
        writing = {
            "--trt": trt,
            "--host": host is not None,
            "--sparsity": sparsity is not None,
            "--batch": batch is not None,
            "--dynamic-batch": dynamic_batch,
            "--uint8-input": uint8_input,
            "--out": out is not None,
            "--data-dir": data_dir is not None,
            "--precision": precision != "fp32",
            str(path): path != LATEST,
        }
        if unused := [flag for flag, value in writing.items() if value]:
            raise UsageError(f"--lint-only checks one file for a --profile and writes none: leave {' and '.join(unused)} out")
        result = workflow.lint_only(lint_only, profile, ui)
        ui.result(result)
        raise typer.Exit(ExitStatus.VERIFICATION if result["outcome"] == "refused" else ExitStatus.OK)
    if dynamic_batch and batch is not None:
        raise UsageError("--dynamic-batch takes any number of images a call, --batch N exactly N: give one of them")
    request = workflow.Request(
        path=path,
        profile=profile,
        trt=trt,
        precision=precision,
        batch=None if dynamic_batch else 1 if batch is None else batch,
        uint8_input=uint8_input,
        host=host,
        sparsity=sparsity,
        out=out,
        data_dir=data_dir,
    )
    result = workflow.export(request, ui)
    workflow.show(result, ui)
    ui.result(result)
    if result["outcome"] == "bundled":
        raise typer.Exit(ExitStatus.DEVICE)
