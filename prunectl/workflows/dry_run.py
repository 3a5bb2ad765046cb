"""What a run would do, without doing it: sizes, costs and the channel groups that would shrink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunectl.console import Console, si
from prunectl.pruning import cost
from prunectl.pruning.surgery import Dense
from prunectl.pruning.ticket import TicketPlan
from prunectl.recipe import Recipe, Ticket
from prunectl.rundir import RunDir
from prunectl.workflows.draw import preflight
from prunectl.workflows.folder import Options
from prunectl.workflows.search import Search
from prunectl.workflows.session import begin
from prunectl.workflows.sfw_prune import prepared


def dry_run(recipe: Recipe, options: Options, ui: Console) -> dict[str, Any]:
    """Reads the data where they are at hand, builds the network, downloads and writes nothing."""
    run, options = RunDir(options.out / recipe.run_name), replace(options, download=False)
    session = prepared(recipe, run, options, ui)[0] if recipe.verb == "sfw-prune" else begin(recipe, run, options, ui)
    if session.data.missing:
        ui.warn(f"{session.data.missing} The numbers of images below are the published ones")
    info, dense = session.data.info, cost.count(session.state.model, session.input_shape)
    flops = cost.training_flops(dense.macs, session.dense_images)
    settings = recipe.ticket or Ticket()
    plan = None
    if recipe.verb == "find-ticket":  # a refusal stands alone
        plan = preflight(session, settings)
        Search.of(session, settings)
    ui.table(
        f"{recipe.verb} {recipe.model.name} {info.name}",
        ["", "value"],
        [
            ["images: training, validation, test", f"{info.n_train}, {info.n_val}, {info.n_test}"],
            ["network input", f"{info.channels} x {info.image_size} x {info.image_size}"],
            ["parameters", si(dense.params)],
            ["MACs an image", si(dense.macs)],
            ["FLOPs an image (2 x MACs)", si(dense.flops)],
            ["epochs, steps an epoch", f"{recipe.train.epochs}, {session.batches[0]}"],
            ["dense training FLOPs", si(flops)],
            ["device, precision", f"{session.place.device}, {session.place.name}"],
            ["run folder", str(options.out / recipe.run_name)],
        ],
    )
    result: dict[str, Any] = {
        "schema": 1,
        "verb": recipe.verb,
        "run": recipe.run_name,
        "outcome": "dry-run",
        "model": recipe.model.name,
        "dataset": recipe.data.name,
        "seed": recipe.seed,
        "params": {"dense": dense.params},
        "macs": {"dense": dense.macs},
        "training_flops": {"dense": flops},
        "warnings": list(ui.warnings),
    }
    if plan:
        result["params"]["ticket"], result["macs"]["ticket"] = plan.cost.params, plan.cost.macs
        result.update(_foreseen(session.state.model, plan, "given" if recipe.start else "untrained", ui))
    ui.say("dry run: nothing was written")
    return result


def _foreseen(model: nn.Module, plan: TicketPlan, which: str, ui: Console) -> dict[str, Any]:
    """The groups that would shrink, and what budgets this network could meet."""
    dense, modules = plan.dense, dict(model.named_modules())
    members = {g.name: [p for p in g.producers if isinstance(modules[p], Dense)] for g in plan.graph.groups}
    ui.table(
        f"coupled channels that can go (widths as the {which} network would be cut)",
        ["group", "layers that write them", "before", "after", "least"],
        [[name, _named(members[name]), before, after, plan.floors[name]] for name, (before, after) in plan.widths.items()],
    )
    for g in plan.graph.groups:
        if g.locked:
            ui.detail(f"{g.name} stays whole: {g.locked}")
    exact, rounded = plan.exact.macs / dense.macs, plan.cost.macs / dense.macs
    ui.say(
        f"predicted: {si(plan.cost.macs)} MACs ({rounded:.3f} of dense; {exact:.3f} before rounding widths to {plan.round_to}), "
        f"{si(plan.cost.params)} parameters ({plan.cost.params / dense.params:.3f})"
    )
    widths = [before for before, _ in plan.widths.values()]
    within = {
        "sparsity": [0.0, 1 - sum(plan.floors.values()) / sum(widths)],
        "target_macs": [plan.least.macs / dense.macs, 1.0],
        "target_params": [plan.least.params / dense.params, 1.0],
    }
    ui.say(
        f"can be asked for: --sparsity up to {within['sparsity'][1]:.3f}, --target-macs from {within['target_macs'][0]:.3f}, "
        f"--target-params from {within['target_params'][0]:.3f}"
    )
    return {
        "budget": {"metric": plan.budget.metric, "value": plan.budget.value},
        "groups": [
            {"name": name, "layers": members[name], "before": before, "after": after, "least": plan.floors[name]}
            for name, (before, after) in plan.widths.items()
        ],
        "locked": {g.name: g.locked for g in plan.graph.groups if g.locked},
        "round_to": plan.round_to,
        "satisfiable": within,
    }


def _named(layers: list[str], most: int = 3) -> str:
    """The first of the layers by name, and how many more there are."""
    return ", ".join(layers[:most]) + (f" and {len(layers) - most} more" if len(layers) > most else "")
