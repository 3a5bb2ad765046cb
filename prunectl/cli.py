"""The command line: parses, calls a workflow, prints. It imports no torch, so that help and lists come at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from prunectl import __version__
from prunectl.errors import ExitStatus, PrunectlError, UnknownName, UsageError

app = typer.Typer(
    name="prunectl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From data set to pruned, verified, measured image classifier on an edge board.\n\n"
    "Start with `prunectl demo`, or `prunectl find-ticket resnet8 fashion-mini`.",
)

# ClickException: typer brings its own click or the system's, by version
ParseError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[2])


def _names(kind: str) -> Callable[[str], list[str]]:
    """What TAB offers in a shell that `--install-completion` has prepared."""
    return lambda incomplete: [name for name in _entries(kind) if name.startswith(incomplete)]


LATEST = Path("runs/latest")
MODEL_HELP = "a registered, torchvision or timm/NAME network, or file.py:function"
DATA_HELP = "a registered data set, or a folder with train/ and val/"
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=_names("models"))]
DataArg = Annotated[str, typer.Argument(metavar="DATASET", help=DATA_HELP, autocompletion=_names("datasets"))]
RecipeOpt = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="settings; default: the shipped recipe, else defaults")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting, e.g. train.lr=0.05 (repeatable)")
]
EpochsOpt = Annotated[int | None, typer.Option("--epochs", help="length of the schedule")]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="of weights, order and augmentation (default 0)")]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
PrecisionOpt = Annotated[str | None, typer.Option("--precision", help="auto, fp32, bf16 or fp16")]
DataDirOpt = Annotated[Path | None, typer.Option("--data-dir", help="where data sets lie; else $PRUNECTL_DATA, else ~/.cache/prunectl")]
OutOpt = Annotated[Path, typer.Option("--out", help="folder of the runs")]
WorkersOpt = Annotated[int | None, typer.Option("--workers", help="processes that read image files")]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="go on with an unfinished run")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="start again, throwing the folder's run away")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="show what would happen; write nothing")]
PrintOpt = Annotated[bool, typer.Option("--print-recipe", help="print the resolved settings as YAML and stop")]
JsonOpt = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, all else on stderr")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="errors and warnings only")]
VerboseOpt = Annotated[int, typer.Option("--verbose", "-v", count=True, help="say more")]
NoProgressOpt = Annotated[bool, typer.Option("--no-progress", help="no progress bars")]

LISTS = {
    "models": "network",
    "datasets": "data set",
    "criteria": "criterion",
    "detectors": "detector",
    "constraints": "constraint",
    "devices": "device",
    "profiles": "export profile",
    "recipes": "recipe",
}
_MODULES = {
    "criteria": "pruning/criteria.py",
    "detectors": "pruning/detectors.py",
    "constraints": "pruning/constraints.py",
    "devices": "bench/devices.py",
    "profiles": "export/profiles.py",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunectl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and stop", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def train(
    model: ModelArg,
    dataset: DataArg,
    start: Annotated[Path | None, typer.Option("--from", metavar="RUN", help="start from a ticket or a saved network")] = None,
    recipe: RecipeOpt = None,
    sets: SetOpt = None,
    epochs: EpochsOpt = None,
    seed: SeedOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    data_dir: DataDirOpt = None,
    out: OutOpt = Path("runs"),
    workers: WorkersOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    print_recipe: PrintOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Train a dense or an already pruned network.

    \b
    Example: prunectl train resnet18 fashion-mnist --epochs 20 --set model.width=0.25
    """
    overrides = {"train.epochs": epochs, "seed": seed, "train.precision": precision, "start": start, "data.dir": data_dir}
    settings = _recipe("train", model, dataset, recipe, sets, overrides)
    ui = _ui(json, quiet, verbose, no_progress)
    if print_recipe:
        return _print_recipe(settings, ui)
    options = _options(out, device, workers, resume, overwrite)
    if dry_run:
        return _dry_run(settings, options, ui)
    from prunectl.workflows import train as workflow

    result = workflow.train(settings, options, ui)
    workflow.show({**result, "run": out / result["run"]}, ui)
    ui.result(_absolute(result, out))


@app.command("find-ticket")
def find_ticket(
    model: ModelArg,
    dataset: DataArg,
    sparsity: Annotated[float | None, typer.Option("--sparsity", help="share of the channels that may go to remove (default 0.5)")] = None,
    target_macs: Annotated[float | None, typer.Option("--target-macs", help="share of dense MACs kept")] = None,
    target_params: Annotated[float | None, typer.Option("--target-params", help="share of dense parameters kept")] = None,
    criterion: Annotated[
        str | None,
        typer.Option("--criterion", help="which channels go (default obs): see `list criteria`", autocompletion=_names("criteria")),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option("--detector", help="when: spline (default), early-bird, epi or epoch:N", autocompletion=_names("detectors")),
    ] = None,
    scope: Annotated[str | None, typer.Option("--scope", help="layerwise or global (default layerwise)")] = None,
    eps: Annotated[float | None, typer.Option("--eps", help="distance below which the partition counts as settled")] = None,
    window: Annotated[int | None, typer.Option("--window", help="how many past probes must be that near")] = None,
    probe: Annotated[str | None, typer.Option("--probe", help="batch (training images) or canvas (a plane through two)")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="inherit, reinit or rewind:E")] = None,
    repair: Annotated[str | None, typer.Option("--repair", help="what stands in for removed channels: none, merge or reconstruct")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="the same as --repair merge")] = False,
    round_to: Annotated[str | None, typer.Option("--round-to", help="auto, or a multiple for every width")] = None,
    keep: Annotated[str | None, typer.Option("--keep", metavar="REGEX", help="layers that keep all channels")] = None,
    search_only: Annotated[bool | None, typer.Option("--search-only", help="stop after the draw")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="prune a saved network; --detector epoch:0 draws from it as it is")
    ] = None,
    recipe: RecipeOpt = None,
    sets: SetOpt = None,
    epochs: EpochsOpt = None,
    seed: SeedOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    data_dir: DataDirOpt = None,
    out: OutOpt = Path("runs"),
    workers: WorkersOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    print_recipe: PrintOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Draw an early ticket: search, prune, train on.

    \b
    Example: prunectl find-ticket resnet50 imagenet --data-dir /data --target-macs 0.3
    """
    if merge and repair not in (None, "merge"):
        raise UsageError(f"--merge is --repair merge, and --repair {repair} is given: leave one of them out")
    ticket = {
        "sparsity": sparsity,
        "target_macs": target_macs,
        "target_params": target_params,
        "criterion": criterion,
        "detector": detector,
        "scope": scope,
        "eps": eps,
        "window": window,
        "probe": probe,
        "weights": weights,
        "repair": "merge" if merge else repair,
        "round_to": int(round_to) if round_to and round_to.lstrip("-").isdigit() else round_to,
        "keep": keep,
        "search_only": search_only,
    }
    common = {"train.epochs": epochs, "seed": seed, "train.precision": precision, "start": start, "data.dir": data_dir}
    overrides = {**common, **{f"ticket.{k}": v for k, v in ticket.items()}}
    settings = _recipe("find-ticket", model, dataset, recipe, sets, overrides)
    _check_names(settings)
    ui = _ui(json, quiet, verbose, no_progress)
    if print_recipe:
        return _print_recipe(settings, ui)
    options = _options(out, device, workers, resume, overwrite)
    if dry_run:
        return _dry_run(settings, options, ui)
    from prunectl.workflows import find_ticket as workflow

    result = workflow.find_ticket(settings, options, ui)
    workflow.show({**result, "run": out / result["run"]}, ui)
    ui.result(_absolute(result, out))
    if result["outcome"] == "not-found":
        raise typer.Exit(ExitStatus.UNSATISFIABLE)


@app.command("sfw-prune")
def sfw_prune(
    model: ModelArg,
    dataset: DataArg,
    constraint: Annotated[
        str | None,
        typer.Option(
            "--constraint",
            help="set the weights stay in: see `prunectl list constraints`; none trains by SGD (default nm)",
            autocompletion=_names("constraints"),
        ),
    ] = None,
    k_fraction: Annotated[
        float | None, typer.Option("--k-fraction", help="share of a tensor's entries (filters, for group-k-support) in a vertex")
    ] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="diameter of every set in twice the tensor's first norm (default 15)")] = None,
    n: Annotated[int | None, typer.Option("--n", help="of N:M (default 2); given, the accuracy at N:M is measured")] = None,
    m: Annotated[int | None, typer.Option("--m", help="of N:M (default 4); given, the accuracy at N:M is measured")] = None,
    sfw_init: Annotated[bool | None, typer.Option("--sfw-init", help="learn a scale for every tensor first")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", help="share of weights removed (repeatable; default 18 shares, 0.1 to 0.99)")
    ] = None,
    scope: Annotated[str | None, typer.Option("--scope", help="what is ranked: weights, or all parameters as published")] = None,
    bn_recal: Annotated[
        int | None, typer.Option("--bn-recal", metavar="N", help="batches of 100 images for batch norm (default 100, 0: none)")
    ] = None,
    start: Annotated[Path | None, typer.Option("--from", metavar="RUN", help="start from a ticket or a saved network")] = None,
    recipe: RecipeOpt = None,
    sets: SetOpt = None,
    epochs: EpochsOpt = None,
    seed: SeedOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    data_dir: DataDirOpt = None,
    out: OutOpt = Path("runs"),
    workers: WorkersOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    print_recipe: PrintOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Train once, prune to any sparsity.

    \b
    Example: prunectl sfw-prune resnet18 fashion-mnist --constraint nm --sparsity 0.5 --sparsity 0.9
    """
    sfw = {
        "constraint": constraint,
        "k_fraction": k_fraction,
        "tau": tau,
        "n": n,
        "m": m,
        "sfw_init": sfw_init,
        "sparsity": sparsity or None,
        "scope": scope,
        "bn_recal": bn_recal,
    }
    common = {"train.epochs": epochs, "seed": seed, "train.precision": precision, "start": start, "data.dir": data_dir}
    settings = _recipe("sfw-prune", model, dataset, recipe, sets, {**common, **{f"sfw.{k}": v for k, v in sfw.items()}})
    _check_names(settings)
    ui = _ui(json, quiet, verbose, no_progress)
    if print_recipe:
        return _print_recipe(settings, ui)
    options = _options(out, device, workers, resume, overwrite)
    if dry_run:
        return _dry_run(settings, options, ui)
    from prunectl.workflows import sfw_prune as workflow

    result = workflow.sfw_prune(settings, options, ui)
    workflow.show({**result, "run": out / result["run"]}, ui)
    ui.result(_absolute(result, out))


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="[RUN]", help="a run, or a folder with plan.json")] = LATEST,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            help="cpu, gpu, orin, tx2 or rtx (default cpu; with --trt what fits the builder)",
            autocompletion=_names("profiles"),
        ),
    ] = None,
    trt: Annotated[bool, typer.Option("--trt", help="build a TensorRT engine too")] = False,
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16 or int8")] = "fp32",
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", help="prune once first: a share of the weights such as 0.9, or 2:4 with --profile gpu, orin or rtx"),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="USER@HOST", help="the board that builds the engine; implies --trt")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="images a call (default 1)")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="any number of images a call")] = False,
    uint8_input: Annotated[bool, typer.Option("--uint8-input", help="normalisation inside the graph: feed pixels")] = False,
    lint_only: Annotated[Path | None, typer.Option("--lint-only", metavar="FILE.onnx", help="check any ONNX file and stop")] = None,
    data_dir: DataDirOpt = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the files (default: inside the run)")] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Write ONNX files, proven equal to the network, and TensorRT engines from them.

    \b
    Example: prunectl export runs/latest --profile tx2 --trt
    """
    ui = _ui(json, quiet, verbose, no_progress)
    from prunectl.workflows import export as workflow

    if lint_only is not None:
        writing: dict[str, Any] = {"--trt": trt, "--host": host, "--sparsity": sparsity, "--batch": batch, "--dynamic-batch": dynamic_batch}
        writing |= {
            "--uint8-input": uint8_input,
            "--out": out,
            "--data-dir": data_dir,
            "--precision": precision != "fp32",
            str(path): path != LATEST,
        }
        if given := [flag for flag, value in writing.items() if value]:
            raise UsageError(f"--lint-only checks one file for a --profile and writes none: leave {' and '.join(given)} out")
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


@app.command()
def bench(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN|ONNX ...]", help="default runs/latest: its dense and pruned network")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu (default), cuda, jetson or replay:FILE")] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="USER@HOST", help="the board; else $PRUNECTL_JETSON")] = None,
    train: Annotated[bool, typer.Option("--train", help="time training steps too")] = False,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="images a call (default: what a file fixes, else 1)")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or int8 (default: fp16 on a board, else fp32)")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="of the exported files (default: what suits the device)")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="seconds before each window")] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="seconds of each window")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", help="interleaved windows of each network")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="short windows, labelled so")] = False,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="what the others are compared with")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads (default: every core allowed)")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME|FILE", help="cpu, jetson-tx2, jetson-orin, or a file of your own")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting, e.g. bench.workspace_mb=256 (repeatable)")
    ] = None,
    data_dir: DataDirOpt = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder of the raw samples, and of what a read-only run cannot take (default: bench/ inside the run)"),
    ] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
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
    ui = _ui(json, quiet, verbose, no_progress)
    from prunectl.workflows.bench_plan import plan

    given = {k: v for k, v in said.items() if v is not None}
    how = plan(recipe=recipe, host=host, quick=quick, given=given, sets=sets or ())
    from prunectl.workflows import bench as workflow

    request = workflow.Request(paths=tuple(paths or ()), plan=how, train=train, batch=batch, baseline=baseline, data_dir=data_dir, out=out)
    result = workflow.bench(request, ui)
    workflow.show(result, ui)
    ui.result(result)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(LISTS))] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """List everything that can be named.

    \b
    Example: prunectl list criteria
    """
    if kind is not None and kind not in LISTS:
        raise UnknownName("list", kind, LISTS)
    found = {k: _entries(k) for k in ([kind] if kind else LISTS)}
    if json:
        _ui(json, quiet, verbose, no_progress).result({"verb": "list", "outcome": "listed", **found})
        return
    for name, entries in found.items():
        typer.echo(f"{name}:")
        width = max(map(len, entries), default=0)
        for entry, text in entries.items():
            typer.echo(f"  {entry:<{width}}  {text}")
    if kind in (None, "models"):
        typer.echo("Any torchvision classification network works too, as do timm/NAME and file.py:function.")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a run, or a folder with plan.json")] = LATEST,
    why: Annotated[str | None, typer.Option("--why", metavar="LAYER", help="why this layer has its width")] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Show a run's widths before and after.

    \b
    Example: prunectl show runs/latest --why layer3.0.conv1
    """
    ui = _ui(json, quiet, verbose, no_progress)
    from prunectl.workflows import show as workflow

    ui.result(workflow.show(path, ui, why=why))


@app.command()
def demo(
    out: OutOpt = Path("runs"),
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
) -> None:
    """Run the whole loop, in minutes, offline.

    The embedded data set is trained on, pruned, exported and measured here.

    \b
    Example: prunectl demo
    """
    ui = _ui(json, quiet, verbose, no_progress)
    from prunectl.workflows import demo as workflow

    result = workflow.demo(_options(out, device, None, False, overwrite), ui)
    workflow.show(result, ui, out)
    ui.result(result)
    if result["outcome"] == "not-found":
        raise typer.Exit(ExitStatus.UNSATISFIABLE)


def main() -> None:
    """Runs the command line and ends the process with the status that errors.py assigns."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lasts
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _first_interrupt)
        signal.signal(signal.SIGTERM, _first_interrupt)
    sys.exit(_run(sys.argv[1:]))


def _first_interrupt(*_: object) -> None:
    """Ctrl-C or SIGTERM. A second one would only disturb what the first began: saying what is saved, and ending."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(argv: list[str]) -> int:
    completing = "_PRUNECTL_COMPLETE" in os.environ or argv[:1] in (["--show-completion"], ["--install-completion"])
    if not argv and not completing:
        _run(["--help"])
        return ExitStatus.USAGE
    try:
        status = int(app(argv, prog_name="prunectl", standalone_mode=False) or 0)
        if status == ExitStatus.INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            return _complain(argv, "interrupted", ExitStatus.INTERRUPTED)
        return status
    except typer.Exit as e:
        return int(e.exit_code)
    except SystemExit as e:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # what typer makes of a reader that left
            return ExitStatus.OK
        if completing:
            return int(e.code or 0)
        return _unforeseen(argv, e)  # a user's file that ends the process
    except ParseError as e:
        where = e.ctx.command_path if e.ctx else "prunectl"
        return _complain(argv, f"{e.format_message().rstrip('.')}; see `{where} --help`", ExitStatus.USAGE)
    except PrunectlError as e:
        return _complain(argv, str(e), e.status)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(argv, "interrupted", ExitStatus.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout().fileno())  # the reader left; nothing more to say to it
        return ExitStatus.OK
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(argv, f"the disk is full{_place(e)}: free some space, then the same command with --resume", ExitStatus.USAGE)
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _complain(argv, f"no permission to write{_place(e)}: choose another folder with --out", ExitStatus.USAGE)
        return _unforeseen(argv, e)
    except Exception as e:  # noqa: BLE001 - the one place that turns the unforeseen into a sentence
        return _unforeseen(argv, e)


def _unforeseen(argv: list[str], e: BaseException) -> int:
    if any(a in ("-v", "-vv", "--verbose") for a in argv):
        import traceback

        traceback.print_exc()
    return _complain(argv, f"internal error, {type(e).__name__}: {e} (add -v for the traceback)", ExitStatus.INTERNAL)


def _place(e: OSError) -> str:
    return f" at {e.filename}" if e.filename else ""


def _complain(argv: list[str], message: str, status: ExitStatus | int) -> int:
    one_line = " ".join(message.split())
    sys.stderr.write(f"error: {one_line}\n")
    if "--json" in argv and _is_first_rank():
        import json

        try:
            _stdout().write(json.dumps({"schema": 1, "outcome": "error", "error": one_line, "exit": int(status)}) + "\n")
            _stdout().flush()
        except OSError:  # the disk is full, or the reader left; stderr has the sentence
            os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout().fileno())
    return int(status)


_document: TextIO | None = None


def _stdout() -> TextIO:
    return _document or sys.stdout


def _keep_stdout_for_the_document() -> None:
    """With --json, what a user's network or a library prints, by whatever means, goes to stderr."""
    global _document
    stdout: TextIO = sys.stdout
    if _document is None and stdout is sys.__stdout__:
        stdout.flush()
        _document = open(os.dup(stdout.fileno()), "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lasts
        os.dup2(2, stdout.fileno())


def _ui(json: bool, quiet: bool, verbose: int, no_progress: bool) -> Any:
    from prunectl.console import Console

    if json:
        _keep_stdout_for_the_document()
    if not _is_first_rank():
        return Console(verbosity=-1, progress=False)
    return Console(json=json, verbosity=-1 if quiet else verbose, progress=not no_progress, stdout=_stdout())


def _is_first_rank() -> bool:
    """Of the processes that torchrun starts, one speaks; dist.rank says the same and would import torch."""
    return os.environ.get("RANK", "0") == "0"


def _options(out: Path, device: str, workers: int | None, resume: bool, overwrite: bool) -> Any:
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite throws it away: give one of them")
    from prunectl.workflows.folder import Options

    return Options(out=out, device=device, workers=workers, resume=resume, overwrite=overwrite)


def _recipe(verb: str, model: str, dataset: str, file: Path | None, sets: list[str] | None, overrides: dict[str, Any]) -> Any:
    from prunectl.data import datasets
    from prunectl.models.names import resolve as known
    from prunectl.recipe import resolve
    from prunectl.registry import canonical

    known(model)
    if dataset in datasets:
        dataset = canonical(dataset)
    elif Path(dataset).expanduser().is_dir():
        dataset = str(Path(dataset).expanduser().resolve())  # one folder, one run, from anywhere
    given = {k: v for k, v in overrides.items() if v is not None}
    return resolve(verb, model=model, dataset=dataset, file=file, overrides=given, sets=sets or [])


def _check_names(settings: Any) -> None:
    """Unknown criteria, detectors and constraints are refused before torch is loaded."""
    named = [("criteria", settings.ticket.criterion), ("detectors", settings.ticket.detector.partition(":")[0])] if settings.ticket else []
    named += [("constraints", settings.sfw.constraint)] if settings.sfw else []
    for kind, name in named:
        known = _entries(kind)
        if name.replace("_", "-").lower() not in known:
            raise UnknownName(LISTS[kind], name, known)


def _print_recipe(settings: Any, ui: Any) -> None:
    ui.document(settings.to_dict())
    if not ui.json:
        typer.echo(settings.to_yaml(), nl=False)


def _dry_run(settings: Any, options: Any, ui: Any) -> None:
    from prunectl.workflows.dry_run import dry_run

    ui.result(dry_run(settings, options, ui))


def _entries(kind: str) -> dict[str, str]:
    if kind == "recipes":
        from prunectl.shipped import known_recipes

        return known_recipes()
    if kind in _MODULES:
        from prunectl.registry import Registry

        return Registry(LISTS[kind], _MODULES[kind]).help()
    if kind == "models":
        from prunectl.models import models

        return models.help()
    from prunectl.data import datasets

    return datasets.help()


def _absolute(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """The result with the paths of its run folder made absolute."""
    run = (out / result["run"]).resolve()
    paths: dict[str, Any] = {
        k: str(run / v) for k, v in result.items() if k in ("ticket", "compact", "dense", "saved") and isinstance(v, str)
    }
    if tickets := result.get("channel_tickets"):
        paths["channel_tickets"] = [{**t, "saved": str(run / t["saved"])} for t in tickets]
    return {**result, **paths, "run": str(run)}
