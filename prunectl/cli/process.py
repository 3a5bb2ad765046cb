"""One process: signals, and an exit status and one sentence for every error. The only place that catches them all."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from typing import cast

import typer

from prunectl.cli.app import app
from prunectl.cli.output import hush, is_first_rank, stdout
from prunectl.errors import ExitStatus, PrunectlError

# ClickException: typer brings its own click or the system's, by version
ParseError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[2])
TRAINING = ("train", "find-ticket", "sfw-prune")  # verbs that go on where they were ended


def main() -> None:
    """Runs the command line and ends the process with the status that errors.py assigns."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lasts
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _first_interrupt)
        signal.signal(signal.SIGTERM, _first_interrupt)
    sys.exit(run(sys.argv[1:]))


def _first_interrupt(*_: object) -> None:
    """Ctrl-C or SIGTERM. A second one would only disturb what the first began: saying what is saved, and ending."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(argv: list[str]) -> int:
    """One command line; its exit status."""
    completing = "_PRUNECTL_COMPLETE" in os.environ or argv[:1] in (["--show-completion"], ["--install-completion"])
    if not argv and not completing:
        run(["--help"])
        return ExitStatus.USAGE
    try:
        status = int(app(argv, prog_name="prunectl", standalone_mode=False) or 0)
        if status == ExitStatus.INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            return _complain(argv, "interrupted", ExitStatus.INTERRUPTED)
        return status
    except typer.Exit as e:
        return int(e.exit_code)
    except SystemExit as e:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # what typer makes of a reader that left
            return ExitStatus.OK
        if completing:
            return int(e.code or 0)
        return _unforeseen(argv, e)  # a user's file that ends the process
    except ParseError as e:
        where = e.ctx.command_path if e.ctx else "prunectl"
        return _complain(argv, f"{e.format_message().rstrip('.')}; see `{where} --help`", ExitStatus.USAGE)
    except PrunectlError as e:
        return _complain(argv, str(e), e.status)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(argv, "interrupted", ExitStatus.INTERRUPTED)
    except BrokenPipeError:
        hush()
        return ExitStatus.OK
    except OSError as e:
        place = f" at {e.filename}" if e.filename else ""
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            again = " with --resume" if argv[0] in TRAINING else " again"
            return _complain(argv, f"the disk is full{place}: free some space, then give the same command{again}", ExitStatus.USAGE)
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _complain(argv, f"no permission to write{place}: choose another folder with --out", ExitStatus.USAGE)
        return _unforeseen(argv, e)
    except Exception as e:  # noqa: BLE001 - the one place that turns the unforeseen into a sentence
        return _unforeseen(argv, e)


def _unforeseen(argv: list[str], e: BaseException) -> int:
    if any(a in ("-v", "-vv", "--verbose") for a in argv):
        traceback.print_exc()
    return _complain(argv, f"internal error, {type(e).__name__}: {e} (add -v for the traceback)", ExitStatus.INTERNAL)


def _complain(argv: list[str], message: str, status: ExitStatus | int) -> int:
    one_line = " ".join(message.split())
    sys.stderr.write(f"error: {one_line}\n")
    if "--json" in argv and is_first_rank():
        try:
            stdout().write(json.dumps({"schema": 1, "outcome": "error", "error": one_line, "exit": int(status)}) + "\n")
            stdout().flush()
        except OSError:  # stderr has the sentence
            hush()
    return int(status)
