"""What the verbs that train share: their settings, --print-recipe, --dry-run, and the result of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunectl.cli.names import KINDS, entries
from prunectl.cli.options import Training
from prunectl.console import Console
from prunectl.errors import UnknownName, UsageError
from prunectl.recipe import Recipe, resolve
from prunectl.registry import canonical

if TYPE_CHECKING:
    from prunectl.workflows.folder import Options

Result = dict[str, Any]
Workflow = Callable[[Recipe, "Options", Console], Result]


def settings_of(verb: str, model: str, dataset: str, given: Training, own: dict[str, Any]) -> Recipe:
    """The recipe that the command line asks for. Unknown names and contradictions are refused before torch is loaded."""
    if given.resume and given.overwrite:
        raise UsageError("--resume goes on with a run, --overwrite throws it away: give one of them")
    from prunectl.data import datasets
    from prunectl.models.names import resolve as known

    known(model)
    if dataset in datasets:
        dataset = canonical(dataset)
    elif Path(dataset).expanduser().is_dir():
        dataset = str(Path(dataset).expanduser().resolve())  # one folder, one run, from anywhere
    common = {"train.epochs": given.epochs, "seed": given.seed, "train.precision": given.precision, "data.dir": given.data_dir}
    overrides = {key: value for key, value in {**common, **own}.items() if value is not None}
    settings = resolve(verb, model=model, dataset=dataset, file=given.recipe, overrides=overrides, sets=given.sets or [])
    named = {"criteria": settings.ticket.criterion, "detectors": settings.ticket.detector.partition(":")[0]} if settings.ticket else {}
    named |= {"constraints": settings.sfw.constraint} if settings.sfw else {}
    for kind, name in named.items():
        if name not in entries(kind):
            raise UnknownName(KINDS[kind], name, entries(kind))
    return settings


def only_looked_at(settings: Recipe, given: Training, ui: Console) -> bool:
    """Whether the run was only to be printed or tried dry, which is then done."""
    if given.print_recipe:
        ui.document(settings.to_dict())
        if not ui.json:
            print(settings.to_yaml(), end="")
    elif given.dry_run:
        from prunectl.workflows.dry_run import dry_run

        ui.result(dry_run(settings, options_of(given), ui))
    return given.print_recipe or given.dry_run


def carry_out(workflow: Workflow, show: Callable[[Result, Console], None], settings: Recipe, given: Training, ui: Console) -> Result:
    """Runs the workflow, shows and prints its result with the paths of its run folder made absolute."""
    result = workflow(settings, options_of(given), ui)
    show({**result, "run": given.out / result["run"]}, ui)
    run = (given.out / result["run"]).resolve()
    paths: Result = {k: str(run / v) for k, v in result.items() if k in ("ticket", "compact", "dense", "saved") and isinstance(v, str)}
    if tickets := result.get("channel_tickets"):
        paths["channel_tickets"] = [{**t, "saved": str(run / t["saved"])} for t in tickets]
    ui.result({**result, **paths, "run": str(run)})
    return result


def options_of(given: Training) -> Options:
    from prunectl.workflows.folder import Options

    return Options(out=given.out, device=given.device, workers=given.workers, resume=given.resume, overwrite=given.overwrite)
