"""Fetching the files of a published data set, with torchvision's addresses and checksums.

A file appears under its name only when it is whole: it is fetched into a folder beside it and moved. A lock lets the
processes of one job wait for the first of them instead of each fetching its own copy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from prunectl.errors import DataMissing

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Remote:
    """One published file: where it may be had, and the MD5 that torchvision publishes for it."""

    urls: tuple[str, ...]
    filename: str
    md5: str


def fetch(name: str, remotes: Sequence[Remote], folder: Path) -> None:
    """The files are in `folder`. Raises DataMissing, with the addresses and the folder, if one cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for remote in remotes:
                if not (folder / remote.filename).exists():
                    _fetch_one(remote, folder)
    except (OSError, RuntimeError, HTTPException) as problem:
        wanted = ", ".join(remote.filename for remote in remotes)
        origin = remotes[0].urls[0].rpartition("/")[0]
        raise DataMissing(
            f"{name} is not on this machine and could not be downloaded ({_brief(problem)}): put {wanted} from {origin} into {folder}, "
            "or name the folder that has it with --data-dir."
        ) from None


def _fetch_one(remote: Remote, folder: Path) -> None:
    from torchvision.datasets.utils import download_url

    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part, _timeout(), contextlib.redirect_stdout(sys.stderr):
        for url in remote.urls:
            try:
                download_url(url, part, remote.filename, remote.md5)
                break
            except (OSError, RuntimeError, HTTPException):
                if url == remote.urls[-1]:
                    raise
        os.replace(Path(part) / remote.filename, folder / remote.filename)


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """A silent network ends after half a minute; torchvision's own download sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _brief(problem: BaseException) -> str:
    return str(getattr(problem, "reason", "") or problem).strip().rstrip(".").split("\n")[0]
