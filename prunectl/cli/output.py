"""Where a verb's lines and its JSON document go."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from prunectl.cli.options import Talk
from prunectl.console import Console

_document: TextIO | None = None


def console(talk: Talk) -> Console:
    """With --json, what a user's network or a library prints, by whatever means, goes to stderr. Of several processes the first speaks."""
    if talk.json:
        _keep_stdout_for_the_document()
    if not is_first_rank():
        return Console(verbosity=-1, progress=False, silent=True)
    return Console(json=talk.json, verbosity=-1 if talk.quiet else talk.verbose, progress=not talk.no_progress, stdout=stdout())


def stdout() -> TextIO:
    """What the JSON document is written to."""
    return _document or sys.stdout


def hush() -> None:
    """The reader left, or the disk is full: nothing more is written to stdout, not even at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout().fileno())


def is_first_rank() -> bool:
    """Of the processes that torchrun starts, the first; dist.rank says the same and would import torch."""
    return os.environ.get("RANK", "0") == "0"


def _keep_stdout_for_the_document() -> None:
    global _document
    current: TextIO = sys.stdout
    if _document is None and current is sys.__stdout__:
        current.flush()
        _document = open(os.dup(current.fileno()), "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lasts
        os.dup2(2, current.fileno())
