"""The tables and pictures in docs/evidence say what the committed cells say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from running import comparable

from benchmarks import cells
from benchmarks.sfw import render as sfw
from benchmarks.sfw import trained
from benchmarks.tickets import prefix
from benchmarks.tickets import render as tickets


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


def test_the_readme_quotes_what_the_pages_say() -> None:
    """Every decimal of a line about what was measured stands in the page that the line links to."""
    root = Path(__file__).parents[2]
    measured = (root / "README.md").read_text(encoding="utf-8").partition("## What was measured")[2].partition("\n\n[docs/evidence]")[0]
    lines = measured.strip().split("\n- ")
    assert len(lines) == 3
    for line in lines:
        (page,) = re.findall(r"\((docs/evidence/\w+\.md)\)", line)
        figures = re.findall(r"\d+\.\d+|\d+e-\d+|\d+ of \d+(?= exported)", line)
        missing = [f for f in figures if f not in (root / page).read_text(encoding="utf-8") and f not in ("0.5", "0.25")]
        assert len(figures) > 3 and missing == []


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
