"""`prunectl train`: a dense or an already pruned network, trained to the end of its schedule."""

from __future__ import annotations

from typing import Any

from prunectl.console import Console, percent, si
from prunectl.pruning import cost
from prunectl.recipe import Recipe
from prunectl.workflows.folder import Options, from_disk, run_folder
from prunectl.workflows.session import averaged, begin, enter, fit, training_images_per_s


def train(recipe: Recipe, options: Options | None = None, ui: Console | None = None) -> dict[str, Any]:
    """Trains and returns the result; a finished run answers from disk.

    The network is saved as model/ in the run folder. The accuracy on `data.final` images is read once, at the end."""
    options, ui = options or Options(), ui or Console(verbosity=-1)
    with run_folder(recipe, options) as run:
        if run.finished:
            return from_disk(run, ui)
        session = begin(recipe, run, options, ui)
        if session.steps == [] and recipe.start:
            ui.detail(f"starting from {recipe.start}")
        enter(session)
        for _ in fit(session):
            pass
        with averaged(session.state):
            final = session.accuracy(recipe.data.final, session.state.model)
            session.write_model("model", session.state.model)
        counted = cost.count(session.state.model, session.input_shape)
        return session.result(
            "trained" if recipe.train.epochs else "untrained",
            epochs=recipe.train.epochs,
            accuracy={"top1": final.top1, "top5": final.top5, "split": recipe.data.final},
            params=counted.params,
            macs=counted.macs,
            flops=counted.flops,
            training_flops=session.spent_flops,
            images_per_s=training_images_per_s(session.rows),
            saved="model",
        )


def show(result: dict[str, Any], ui: Console) -> None:
    split = result["accuracy"]["split"]
    ui.table(
        f"{result['model']} on {result['dataset']}, {result['epochs']} epochs",
        ["", "value"],
        [
            [f"{split} accuracy, top 1", f"{result['accuracy']['top1']:.2f} %"],
            [f"{split} accuracy, top 5", f"{percent(result['accuracy']['top5'])} %" if result["accuracy"]["top5"] is not None else None],
            ["parameters", si(result["params"])],
            ["MACs an image", si(result["macs"])],
            ["training FLOPs", si(result["training_flops"])],
            ["images a second", None if result["images_per_s"] is None else f"{result['images_per_s']:.0f}"],
            ["wall time", f"{result['wall_s']:.0f} s"],
        ],
    )
    ui.say(f"run: {result['run']}")
