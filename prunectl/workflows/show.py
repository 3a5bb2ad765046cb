"""`prunectl show`: what a run or a saved network holds, and why a layer shrank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunectl.console import Console, percent, si
from prunectl.errors import CorruptFile, RunFolderError, UnknownName, UsageError
from prunectl.export.artifact import read_record, record_path
from prunectl.rundir import RunDir, read_json, read_jsonl
from prunectl.training import compactmodel


def show(path: Path, ui: Console, *, why: str | None = None) -> dict[str, Any]:
    """Prints and returns the layers of the network at `path`, or the reasons for one layer's width."""
    if not path.exists():
        raise RunFolderError(f"there is no run or saved network at {path}")
    if why is not None:
        return _why(path, why, ui)
    run = RunDir(path)
    if run.recipe.is_file() and not run.finished:
        rows = read_jsonl(run.metrics)
        if rows and not {"epoch", "val_top1"} <= rows[-1].keys():
            raise CorruptFile(f"{run.metrics}: its last line says neither epoch nor validation accuracy; delete that line")
        last = f"epoch {rows[-1]['epoch']}, validation {rows[-1]['val_top1']:.2f} %" if rows else "no epoch finished"
        ui.say(f"{path} is unfinished ({last}); go on with the same command and --resume")
        return {"schema": 1, "verb": "show", "outcome": "unfinished", "path": str(path), "metrics": rows}
    saved = compactmodel.read(compactmodel.locate(path))
    after, before = saved.module(), compactmodel.rebuild(saved.plan["model"], [])
    layers = []
    for (name, old), (_, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        if hasattr(old, "weight") and getattr(old, "weight", None) is not None and old.weight.dim() > 1:
            layers.append(
                {"layer": name, "before": list(old.weight.shape[:2]), "after": list(new.weight.shape[:2]), "params": new.weight.numel()}
            )
    ui.table(
        f"{saved.plan['model']['name']} in {saved.path}",
        ["layer", "outputs x inputs before", "after", "parameters"],
        [[r["layer"], "x".join(map(str, r["before"])), "x".join(map(str, r["after"])), si(r["params"])] for r in layers],
    )
    plan = saved.plan
    ui.say(f"parameters {plan['params']:,}, MACs an image {plan['macs']:,}, FLOPs {2 * plan['macs']:,}")
    result: dict[str, Any] = {"schema": 1, "verb": "show", "run": plan["parent"], "outcome": "shown"}
    result |= {"model": plan["model"]["name"], "dataset": plan["data"]["name"], "path": str(saved.path), "layers": layers}
    result |= {k: plan[k] for k in ("params", "macs")} | _whose(run)
    if run.ticket.is_file() and (run.path / "dense").is_dir() and (searched := compactmodel.read(run.path / "dense").plan)["steps"]:
        ui.say(f"its ticket was found in a network that had been pruned to {searched['params']:,} parameters: --why counts from there")
    if run.finished:
        result["result"] = run.read_result()
    result["exports"] = exports = _exports(path if path.is_dir() else path.parent)
    if exports:
        files = [[Path(e["path"]).name, e["profile"], e["precision"], f"{e['bytes']:,}", percent(e["accuracy"])] for e in exports]
        ui.table("exported files", ["file", "profile", "precision", "bytes", "test accuracy, %"], files)
    return result


def _exports(folder: Path) -> list[dict[str, Any]]:
    """The ONNX files in export/, with what their records say. Raises CorruptFile for one that is not as it was written."""
    files = [f for f in sorted((folder / "export").glob("*.onnx")) if record_path(f).is_file()]
    kept = ("profile", "precision", "sha256", "bytes", "accuracy")
    return [{"path": str(f.resolve()), **{k: v for k, v in read_record(f).to_dict().items() if k in kept}} for f in files]


def _why(path: Path, layer: str, ui: Console) -> dict[str, Any]:
    run = RunDir(path)
    if not run.ticket.is_file():
        none = run.finished and run.read_result().get("outcome") == "not-found"
        found = "that run found no ticket, so every layer kept its width" if none else f"{path} has no ticket.json"
        raise UsageError(f"--why needs a finished find-ticket run; {found}")
    ticket = read_json(run.ticket)
    if "producers" not in ticket:
        raise UsageError(f"{run.ticket} is of an earlier version, which did not record who reads and writes; --overwrite makes it anew")
    if lost := {"members", "readers", "kept", "widths", "dropped", "criterion", "scope", "round_to"} - ticket.keys():
        raise CorruptFile(f"{run.ticket} is damaged: it has no {' and no '.join(sorted(lost))}; --overwrite makes it anew")
    groups = {name: members for name, members in ticket["members"].items() if layer in members}
    if not groups:
        raise UnknownName("layer", layer, sorted({m for members in ticket["members"].values() for m in members}))
    answers = []
    for name, members in groups.items():
        text, width, dropped = _reason(ticket, name, layer), ticket["widths"].get(name), ticket["dropped"].get(name, [])
        ui.say(text)
        answers.append({"group": name, "width": width, "members": members, "dropped": dropped, "text": text})
    return {"schema": 1, "verb": "show", "outcome": "explained", **_whose(run), "path": str(path), "layer": layer, "groups": answers}


def _whose(run: RunDir) -> dict[str, Any]:
    result = run.read_result() if run.finished else {}
    return {key: result[key] for key in ("run", "model", "dataset", "seed") if key in result}


def _reason(ticket: dict[str, Any], group: str, layer: str) -> str:
    """What happened to the channels of `group`, and what `layer` has to do with them."""
    writers, readers = ticket["producers"][group], ticket["readers"][group]
    sides = [side for side, layers in (("outputs", writers), ("inputs", readers)) if layer in layers]
    head = f"{' and '.join(sides or ['channels'])} of {layer} (channels of {group})"
    if group not in ticket["widths"]:
        return f"{head} stay whole: {ticket['kept'][group]}"
    before, after = ticket["widths"][group]
    dropped = ticket["dropped"].get(group, [])
    return (
        f"{head}: {before} -> {after} by criterion {ticket['criterion']} ({ticket['scope']}, widths in multiples of "
        f"{ticket['round_to']}); dropped {dropped or 'none'}; written by {', '.join(writers)}; read by {', '.join(readers) or 'none'}"
    )
