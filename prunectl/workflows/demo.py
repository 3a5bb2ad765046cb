"""`prunectl demo`: the whole loop on the embedded data set, as one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.console import Console, si
from prunectl.errors import Interrupted
from prunectl.recipe import Recipe, resolve
from prunectl.rundir import RunDir
from prunectl.workflows.bench import Request as Bench
from prunectl.workflows.bench import bench
from prunectl.workflows.bench_plan import plan
from prunectl.workflows.export import Request as Export
from prunectl.workflows.export import export
from prunectl.workflows.find_ticket import find_ticket
from prunectl.workflows.folder import Options
from prunectl.workflows.train import train

MODEL, DATASET = "resnet8", "fashion-mini"


def demo(options: Options, ui: Console) -> dict[str, Any]:
    """Trains resnet8 dense, finds and trains its ticket on the same schedule, exports both and times them; all of it resumes."""
    try:
        return _demo(options, ui)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"interrupted: what is done is kept in {options.out}; the same command goes on from there") from None


def _demo(options: Options, ui: Console) -> dict[str, Any]:
    ui.say(f"1/4  prunectl train {MODEL} {DATASET}")
    dense = train(*_resuming("train", options), ui)
    ui.say(f"2/4  prunectl find-ticket {MODEL} {DATASET}")
    ticket = find_ticket(*_resuming("find-ticket", options), ui)
    runs = [options.out / dense["run"], options.out / ticket["run"]]
    small = runs[1] / ("compact" if ticket["compact"] else "dense")
    ui.say(f"3/4  prunectl export {runs[0]} ; prunectl export {runs[1]}")
    exported = {name: export(Export(path=path), ui)["artifacts"][0] for name, path in (("dense", runs[0]), ("ticket", small))}
    ui.say("4/4  prunectl bench --quick, both ONNX files side by side")
    measured = bench(Bench(paths=tuple(Path(a["path"]) for a in exported.values()), plan=plan(quick=True)), ui)
    return {
        "schema": 1,
        "verb": "demo",
        "outcome": ticket["outcome"],
        "train": dense,
        "find_ticket": ticket,
        "export": exported,
        "bench": measured,
        "files": _files(options.out, dense, ticket),
    }


def _resuming(verb: str, options: Options) -> tuple[Recipe, Options]:
    """The recipe of one step, and the options that go on with its run where one was begun."""
    recipe = resolve(verb, model=MODEL, dataset=DATASET)
    begun = RunDir(options.out / recipe.run_name).recipe.is_file()
    return recipe, replace(options, resume=begun and not options.overwrite)


def _files(out: Path, dense: dict[str, Any], ticket: dict[str, Any]) -> dict[str, int | None]:
    """Bytes of the saved networks."""
    small = out / ticket["run"] / "compact" / "model.safetensors"
    large = out / dense["run"] / "model" / "model.safetensors"
    return {"dense": large.stat().st_size, "ticket": small.stat().st_size if small.is_file() else None}


def show(result: dict[str, Any], ui: Console, out: Path) -> None:
    dense, ticket, files = result["train"], result["find_ticket"], result["files"]
    found, a, flops = ticket["outcome"] == "found", ticket["accuracy"], ticket["training_flops"]

    def of_ticket(value: Any) -> Any:
        return value if found else None

    def two(value: float | None) -> str | None:
        return None if value is None else f"{value:.2f}"

    def pair(label: str, before: float, after: float | None) -> list[str | None]:
        ratio = None if after is None else f"{after / before:.2f}"
        return [label, si(before), None if after is None else si(after), ratio]

    drawn = f"ticket drawn after {ticket['found_epoch']:g}" if found else "no ticket found"
    ratio = next(r for r in result["bench"]["ratios"] if r["metric"] == "latency_ms")
    ms, exported = [f"{r['latency_ms']['p50']:.3f}" for r in result["bench"]["reports"]], result["export"]
    ui.table(
        f"{MODEL} on {DATASET}: {dense['epochs']} epochs, {drawn}",
        ["", "dense", "ticket", "ticket/dense"],
        [
            ["validation at the draw, %", two(a["dense_at_draw"]), None, None],
            ["  right after pruning, %", None, two(a["raw"]), None],
            ["  batch norm re-calibrated, %", None, two(a["bn_recalibrated"]), None],
            ["test at the end, %", two(dense["accuracy"]["top1"]), two(of_ticket(a["final"])), None],
            pair("parameters", dense["params"], ticket["params"]["ticket"]),
            pair("MACs an image", dense["macs"], ticket["macs"]["ticket"]),
            pair("training FLOPs (search included)", flops["dense"], of_ticket(flops["spent"])),
            pair("file, bytes", files["dense"], files["ticket"]),
            ["test of the ONNX file, %", two(exported["dense"]["accuracy"]), two(of_ticket(exported["ticket"]["accuracy"])), None],
            ["ONNX Runtime here, ms an image", ms[0], of_ticket(ms[1]), of_ticket(f"{ratio['median']:.2f}")],
        ],
    )
    ui.say(f"runs: {out / dense['run']}, {out / ticket['run']}")
