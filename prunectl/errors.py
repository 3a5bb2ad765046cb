"""Every error a user can cause, each with the exit status it ends in.

    PrunectlError                 1   something we did not foresee
    ├── UsageError                2   an option, a name or a recipe value that cannot be used
    │   ├── UnknownName           2   a name no registry knows, with the nearest known one
    │   └── RunFolderError        2   a run folder that is busy, unfinished, foreign or unwritable
    ├── Unsatisfiable             3   a constraint that cannot be met, nothing pruned, no ticket found
    ├── VerificationFailed        4   a file or a network that is not what it claims to be
    │   └── CorruptFile           4   a checksum or a structure that does not hold
    ├── DeviceUnavailable         5   a board, a GPU or a tool that is missing or unreachable
    ├── DataMissing               6   a data set that is missing, truncated or of another format
    │   └── NotDownloaded         6   one that a download would bring, where none is to be made
    └── Interrupted             130   Ctrl-C, after the state was saved

A message is one sentence or two: what came, what was expected, what to do. Only `cli.main` catches this tree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitStatus(IntEnum):
    OK = 0
    INTERNAL = 1
    USAGE = 2
    UNSATISFIABLE = 3
    VERIFICATION = 4
    DEVICE = 5
    DATA = 6
    INTERRUPTED = 130


class PrunectlError(Exception):
    status = ExitStatus.INTERNAL


class UsageError(PrunectlError):
    status = ExitStatus.USAGE


class RunFolderError(UsageError):
    pass


class Unsatisfiable(PrunectlError):
    status = ExitStatus.UNSATISFIABLE


class VerificationFailed(PrunectlError):
    status = ExitStatus.VERIFICATION


class CorruptFile(VerificationFailed):
    pass


class DeviceUnavailable(PrunectlError):
    status = ExitStatus.DEVICE


class DataMissing(PrunectlError):
    status = ExitStatus.DATA


class NotDownloaded(DataMissing):
    """The files would have to be fetched, and are not to be."""


class Interrupted(PrunectlError):
    status = ExitStatus.INTERRUPTED


class UnknownName(UsageError):
    """`kind` has no entry `name`; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.55)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
        super().__init__(f"unknown {kind} '{name}': {advice}{' ' + hint if hint else ''}")
