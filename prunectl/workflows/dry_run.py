"""What a run would do, without doing it: sizes, costs and the channel groups that would shrink."""

from __future__ import annotations

from typing import Any

from prunectl.console import Console, si
from prunectl.pruning import cost
from prunectl.recipe import Recipe, Ticket
from prunectl.rundir import RunDir
from prunectl.workflows.draw import budget_of, preflight
from prunectl.workflows.session import Options, begin
from prunectl.workflows.sfw_prune import prepared


def dry_run(recipe: Recipe, options: Options, ui: Console) -> dict[str, Any]:
    """Reads the data, builds the network, writes nothing."""
    run = RunDir(options.out / recipe.run_name)
    session = prepared(recipe, run, options, ui)[0] if recipe.verb == "sfw-prune" else begin(recipe, run, options, ui)
    info, dense = session.data.info, cost.count(session.state.model, session.input_shape)
    flops = cost.training_flops(dense.macs, session.dense_images)
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
    if recipe.verb == "find-ticket":
        settings = recipe.ticket or Ticket()
        plan = preflight(session, settings)
        members = {g.name: g.producers for g in plan.graph.groups}
        ui.table(
            "coupled channels that can go (widths as the untrained network would be cut)",
            ["group", "layers in it", "before", "after"],
            [[name, len(members[name]), before, after] for name, (before, after) in plan.widths.items()],
        )
        for g in plan.graph.groups:
            if g.locked:
                ui.detail(f"{g.name} stays whole: {g.locked}")
        exact, rounded = plan.exact.macs / dense.macs, plan.cost.macs / dense.macs
        ui.say(
            f"predicted: {si(plan.cost.macs)} MACs ({rounded:.3f} of dense; {exact:.3f} before rounding widths to {plan.round_to}), "
            f"{si(plan.cost.params)} parameters ({plan.cost.params / dense.params:.3f})"
        )
        result["params"]["ticket"], result["macs"]["ticket"] = plan.cost.params, plan.cost.macs
        result["budget"] = {"metric": budget_of(settings).metric, "value": budget_of(settings).value}
        result["groups"] = [{"name": n, "layers": list(members[n]), "before": b, "after": a} for n, (b, a) in plan.widths.items()]
        result["round_to"] = plan.round_to
    ui.say("dry run: nothing was written")
    return result
