"""The tables and pictures in docs/evidence say what the committed cells say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.sfw import render as sfw
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
