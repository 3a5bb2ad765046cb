"""What a user sees: lines, tables and one progress bar, with a --json twin that keeps stdout for one document.

Bars appear only on a terminal, and never under CI, NO_COLOR or TERM=dumb. Warnings are shown at once and kept, because
every result carries them."""

from __future__ import annotations

import json as jsonlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


@dataclass
class Console:
    json: bool = False
    verbosity: int = 0  # -1 quiet, 0 normal, 1 verbose
    progress: bool = True
    silent: bool = False  # of several processes all but the first: warnings are kept and not shown
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    stdout: TextIO | None = None  # where the document goes; default sys.stdout

    def __post_init__(self) -> None:
        from rich.console import Console as Rich

        width = None if (sys.stderr if self.json else sys.stdout).isatty() else 1000  # a file or a pipe has no width of its own
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}  # text is shown as it is
        self._out = Rich(stderr=self.json, width=width, **plain)
        self._err = Rich(stderr=True, **plain)
        muted = any(os.environ.get(v) for v in ("CI", "NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self.bars = self.progress and self.verbosity >= 0 and not muted and self._err.is_terminal and (self.json or sys.stdout.isatty())

    def say(self, text: str) -> None:
        if self.verbosity >= 0:
            self._out.print(text)

    def detail(self, text: str) -> None:
        if self.verbosity > 0:
            self._out.print(text)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            if not self.silent:
                self._err.print(f"warning: {text}", style="yellow")

    def error(self, text: str) -> None:
        self._err.print(f"error: {text}", style="red")

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Columns after the first are right-aligned; None shows as a dash."""
        if self.verbosity < 0:
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*("-" if cell is None else str(cell) for cell in row))
        self._out.print(table, crop=False)

    def track(self, items: Iterable[T], *, total: int, done: int = 0, label: str = "") -> Iterator[T]:
        """`items`, with a bar and the time left while they last."""
        if not self.bars:
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._out, transient=True, refresh_per_second=4) as bar:
            task = bar.add_task(label, total=total, completed=done)
            for item in items:
                bar.advance(task)
                yield item

    @contextmanager
    def working(self) -> Iterator[Callable[[str], None]]:
        """A function that says what is going on: in one line that changes, on a terminal; elsewhere in lines, with -v.

        Nothing is drawn between two calls: a thread that did would disturb what is being timed."""
        if not self.bars:
            yield self.detail
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._out, transient=True, auto_refresh=False) as line:
            task = line.add_task("starting", total=None)
            yield lambda text: line.update(task, description=text, refresh=True)

    def result(self, value: dict[str, Any]) -> None:
        """A verb's result as the document of --json, under the keys that every result has: null where they do not apply."""
        if self.json:
            from prunectl.versions import versions

            nothing = dict.fromkeys(("run", "outcome", "model", "dataset", "seed"))
            made = {"wall_s": round(time.monotonic() - self.started, 3), "versions": versions(), "warnings": list(self.warnings)}
            self.document({"schema": 1, "verb": value["verb"], **nothing, **made, **value})

    def document(self, value: dict[str, Any]) -> None:
        """The one JSON document of --json on stdout."""
        if self.json:
            stdout = self.stdout or sys.stdout
            stdout.write(jsonlib.dumps(value, indent=2) + "\n")
            stdout.flush()


def si(value: float) -> str:
    """12_345_678 as 12.3 M."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{abs(value):.3g}") >= scale:  # 999.6 k is 1 M
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
