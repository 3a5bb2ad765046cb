"""What is shown where: stdout is for results, or for one JSON document; text is shown letter by letter."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys

import pytest

from prunectl.console import Console, percent, si


def _shown(act, **settings) -> tuple[str, str, Console]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ui = Console(**settings)
        act(ui)
    return out.getvalue(), err.getvalue(), ui


def _everything(ui: Console) -> None:
    ui.say("said")
    ui.detail("a detail")
    ui.warn("careful")
    ui.warn("careful")
    ui.table("title", ["name", "value"], [["a", 1], ["b", None]])
    ui.document({"answer": 42})


def test_text_goes_to_stdout_warnings_once_to_stderr():
    out, err, ui = _shown(_everything)
    assert "said" in out and "title" in out and "a detail" not in out and "42" not in out
    assert err == "warning: careful\n" and ui.warnings == ["careful"]


def test_with_json_stdout_is_the_document_alone():
    out, err, _ = _shown(_everything, json=True)
    assert json.loads(out) == {"answer": 42}
    assert "said" in err and "title" in err and "careful" in err


def test_quiet_keeps_warnings_and_documents():
    out, err, _ = _shown(_everything, verbosity=-1)
    assert (out, err) == ("", "warning: careful\n")
    out, _, _ = _shown(_everything, verbosity=-1, json=True)
    assert json.loads(out) == {"answer": 42}


def test_verbose_adds_details():
    assert "a detail" in _shown(_everything, verbosity=1)[0]


@pytest.mark.parametrize("text", ["runs[/x]", "[red]runs", "[bold]", ":cat: file.py:smile:net", "\\[x]"])
def test_brackets_and_colons_are_shown_as_they_are(text):
    """Paths and names may hold what the library would take for markup, or fail on."""
    for act in (lambda ui: ui.say(text), lambda ui: ui.table(text, ["x"], [[text]]), lambda ui: ui.table("t", [text], [[text, text][:1]])):
        assert text in _shown(act)[0]
    assert text in _shown(lambda ui: ui.warn(text))[1]


def test_a_table_shows_long_cells_whole_when_there_is_no_terminal():
    long = "x" * 300
    assert long in _shown(lambda ui: ui.table("t", ["a"], [[long]]))[0]


def test_numbers():
    assert [si(v) for v in (0, 12, 999, 1000, 12_345_678, 4.1e9, 5e16)] == ["0", "12", "999", "1 k", "12.3 M", "4.1 G", "50 P"]
    assert (percent(None), percent(93.456)) == (None, "93.46")


def test_si_rounds_into_the_next_unit():
    assert (si(999_999), si(999.6)) == ("1 M", "1 k")


def test_track_passes_items_through_and_closes_its_source():
    closed = []

    def source():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    ui = Console(progress=False)
    taken = ui.track(source(), total=10)
    assert [next(taken), next(taken)] == [0, 1]
    taken.close()
    assert closed == [True]


def _on_a_terminal(env: dict[str, str], *flags: str) -> bool:
    """Whether a bar may appear when both streams are a real pseudo-terminal."""
    leader, follower = pty.openpty()
    code = f"import sys; from prunectl.console import Console; sys.exit(0 if Console({', '.join(flags)}).bars else 1)"
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "TERM")}
    done = subprocess.run([sys.executable, "-c", code], stdout=follower, stderr=follower, env={**clean, "TERM": "xterm", **env}, timeout=60)
    os.close(leader)
    os.close(follower)
    return done.returncode == 0


def test_bars_appear_on_a_terminal_and_only_there():
    assert _on_a_terminal({})
    assert not _on_a_terminal({"CI": "1"})
    assert not _on_a_terminal({"NO_COLOR": "1"})
    assert not _on_a_terminal({"TERM": "dumb"})
    assert not _on_a_terminal({}, "progress=False")
    assert not _on_a_terminal({}, "verbosity=-1")
    assert not Console().bars or sys.stderr.isatty()
