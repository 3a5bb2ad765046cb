"""The tables in docs/evidence say what the committed cells say."""

from __future__ import annotations

from benchmarks.tickets import render


def test_ticket_tables_are_rendered_from_the_cells() -> None:
    assert render.cells(), "no committed cells"
    assert render.TARGET.read_text(encoding="utf-8") == render.text()
