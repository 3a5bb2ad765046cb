"""`prunectl train`."""

from __future__ import annotations

from prunectl.cli.options import DataArg, ModelArg, StartOpt, Talk, Training
from prunectl.cli.output import console
from prunectl.cli.training import carry_out, only_looked_at, settings_of


def train(model: ModelArg, dataset: DataArg, start: StartOpt = None, *, given: Training, talk: Talk) -> None:
    """Train a dense or an already pruned network.

    \b
    Example: prunectl train resnet18 fashion-mnist --epochs 20 --set model.width=0.25
    """
    settings, ui = settings_of("train", model, dataset, given, {"start": start}), console(talk)
    if only_looked_at(settings, given, ui):
        return
    from prunectl.workflows import train as workflow

    carry_out(workflow.train, workflow.show, settings, given, ui)
