"""The tables of docs/evidence/export.md say what the committed results say."""

from benchmarks import export_render


def test_the_tables_are_rendered_from_the_results():
    assert export_render.ZOO.is_file()
    assert export_render.TARGET.read_text(encoding="utf-8") == export_render.text()
