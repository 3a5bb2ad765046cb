"""The tables and pictures in docs/evidence say what the committed cells say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from running import comparable

from benchmarks import cells
from benchmarks.sfw import cells as trained_stages
from benchmarks.sfw import render as sfw
from benchmarks.sfw import trained
from benchmarks.tickets import cells as stages
from benchmarks.tickets import prefix
from benchmarks.tickets import render as tickets
from prunectl.cli.process import run


@pytest.mark.parametrize("render", [tickets, sfw], ids=["tickets", "sfw"])
def test_tables_and_pictures_are_rendered_from_the_cells(render) -> None:  # type: ignore[no-untyped-def]
    assert cells.read(render.RESULTS), "no committed cells"
    picture = render.TARGET.with_suffix(".png")
    assert cells.outdated({render.TARGET: render.text}, {picture: (render.plot, render.curves)}) == []


def test_a_changed_cell_is_noticed(tmp_path: Path) -> None:
    picture = tmp_path / "sfw.png"
    sfw.plot(picture)
    assert cells.outdated({}, {picture: (sfw.plot, sfw.curves)}) == []
    assert cells.outdated({}, {picture: (sfw.plot, lambda: {**sfw.curves(), "another": {}})}) == ["sfw.png"]
    assert cells.outdated({tmp_path / "gone.md": sfw.text}, {}) == ["gone.md"]


QUOTED = [
    ("tickets.md", "## wider: resnet18, width 0.5, test", "| fifth-flip |", ["91.69 ± 0.08", "-0.34 ± 0.10", "0.199", "472.1 k"]),
    ("tickets.md", "## wider: resnet18, width 0.5, test", "| dense |", ["92.03 ± 0.18", "2797.0 k"]),
    ("tickets.md", "## full: resnet18, width 1, test", "| default-50 |", ["94.29"]),
    ("export.md", "## Channels removed", "| prunectl, half of every layer |", ["3.89 x", "3.48 x"]),
    ("sfw.md", "## wide: resnet18, width 0.25, test, batch norm", "| default |", ["90.58", "91.30"]),
    ("sfw.md", "## wide: resnet18, width 0.25, test, batch norm", "| k-support |", ["81.52"]),
    ("sfw.md", "## wide: resnet18, width 0.25, test, batch norm", "| k-sparse |", ["83.55"]),
    ("sfw.md", "## wide: resnet18, width 0.25, test, batch norm", "| sgd |", ["87.94"]),
    ("sfw.md", "## wide: resnet18, width 0.25, test, batch norm", "| sgd-fade |", ["90.93"]),
]


def test_the_readme_quotes_what_the_pages_say() -> None:
    root = Path(__file__).parents[2]
    measured = (root / "README.md").read_text(encoding="utf-8").partition("## What was measured")[2].partition("\n## ")[0]
    for page, heading, arm, figures in QUOTED:
        section = (root / "docs" / "evidence" / page).read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
        (row,) = [line for line in section.splitlines() if line.startswith(arm)]
        assert [f for f in figures if f not in row or f not in measured] == [], (page, arm)
    known = " ".join(f for *_, figures in QUOTED for f in figures)
    assert [f for f in re.findall(r"\d+\.\d+", measured) if f not in known and f not in ("0.5", "0.25")] == []


@pytest.mark.parametrize("stage", [*stages.STAGES.values(), *trained_stages.STAGES.values()], ids=lambda stage: stage.__name__)
def test_every_cell_asks_for_a_recipe_that_there_is(stage, capsys) -> None:  # type: ignore[no-untyped-def]
    first = min(c.seed for c in stage())
    for cell in (c for c in stage() if c.program == "prunectl" and c.seed == first):
        assert run([*cell.command("runs")[1:], "--print-recipe"]) == 0, cell.name
        assert json.loads(capsys.readouterr().out)


def test_the_rivals_program_knows_its_criteria() -> None:
    cell = next(c for c in stages.criteria() if c.program == stages.RIVALS)
    words = [sys.executable, "-m", *cell.command("runs"), "--print-recipe"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["ticket"]["criterion"] == "tp-magnitude", done.stderr


class Small(cells.Cell):
    def command(self, out: str) -> list[str]:
        sets = ("data.train_images=256", "data.val_fraction=0.05", *(["ticket.probes_per_epoch=2"] if self.verb == "find-ticket" else []))
        sets += (f"data.final={self.judged}",)
        words = ("--epochs", "3", *(part for s in sets for part in ("--set", s)), *self.options, "--out", out, "--json", "--resume", "-q")
        return ["prunectl", self.verb, "resnet8", "fashion-mini", *words]


@pytest.mark.slow
def test_an_arm_that_was_lent_its_search_ends_as_one_that_searched_itself(tmp_path: Path) -> None:
    options = ("--criterion", "l2", "--detector", "epoch:1.5", "--sparsity", "0.4", "--set", "ticket.rewarm_epochs=1")
    cell = Small("l2", "thin", 0, "find-ticket", options)
    for runs, prepare in (("alone", None), ("lent", prefix.lend)):
        if prepare:
            prepare(cell, str(tmp_path / runs))
            assert list((tmp_path / runs).glob("find-ticket-*/checkpoints/epoch-00001.json"))
        cells.run(cell, str(tmp_path / runs), tmp_path / f"{runs}-results")
    alone, lent = (next((tmp_path / runs).glob("find-ticket-*")) for runs in ("alone", "lent"))
    assert comparable(alone) == comparable(lent)


@pytest.mark.slow
def test_an_arm_that_was_lent_its_trained_network_ends_as_one_that_trained_itself(tmp_path: Path) -> None:
    cell = Small("sgd", "thin", 0, "sfw-prune", ("--constraint", "none", "--sparsity", "0.5"), judged="val")
    cells.run(cell, str(tmp_path / "alone"), tmp_path / "alone-results")
    cells.run(replace(cell, judged="test"), str(tmp_path / "lent"), tmp_path / "test-results")
    trained.lend(cell, str(tmp_path / "lent"))
    cells.run(cell, str(tmp_path / "lent"), tmp_path / "lent-results")
    alone, lent = (json.loads((tmp_path / f"{runs}-results" / f"{cell.name}.json").read_text()) for runs in ("alone", "lent"))
    for told in ("accuracy", "sweep"):
        assert alone["result"][told] == lent["result"][told]
