"""When draws fall: planned before training, made during it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunectl.console import Console
from prunectl.pruning.detectors import Epoch
from prunectl.training.loop import Step
from prunectl.workflows.search import Search


@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 9), st.floats(0.05, 2.5), st.integers(1, 6), st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_as_many_draws_are_made_as_were_planned(steps, per_epoch, draws, every, epochs, first):
    """Whatever the number of steps in an epoch, and none of them on the last step, after which nothing trains."""
    begin = max(1, min(round(first * steps * epochs), steps * epochs - 1))
    assume(begin < steps * epochs)
    recipe = SimpleNamespace(train=SimpleNamespace(epochs=epochs))
    session = SimpleNamespace(batches=(steps, 8), recipe=recipe, ui=Console(verbosity=-1))
    search = Search("epoch", {"epoch": Epoch(at=0)}, torch.zeros(1), per_epoch, draws=draws, draw_every=every)
    search.fit_into(session, begin / steps)
    made = [begin]
    search.ticket = {"draws": [{"nth": 1, "epoch": begin / steps}]}
    for step in range(begin + 1, steps * epochs + 1):
        if search.says_draw(session, Step(step / steps, (step - 1) % steps + 1, steps, 8, None)):
            made.append(step)
            search.ticket["draws"].append({"nth": len(made), "epoch": step / steps})
    assert len(made) == search.draws <= draws and made[-1] < steps * epochs
    assert all((b - a) / steps >= every - 1 / steps for a, b in itertools.pairwise(made))
    if len(made) < draws:
        probe = max(made[-1] * per_epoch // steps + 1, math.ceil((made[-1] / steps + every) * per_epoch - 1e-9))
        assert math.ceil(probe * steps / per_epoch) >= steps * epochs, "another draw would have had its place"
