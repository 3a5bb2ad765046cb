"""A remote command by the user's own OpenSSH: their configuration, keys, agent and known hosts, none of it overridden.

Never asks a question (BatchMode), never waits for ever (timeouts), never lets a word of ours be read as an option or by a shell.
Host keys are checked as the user's ssh checks them. $PRUNECTL_SSH names another ssh, `ssh -F FILE` say."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from prunectl.errors import UsageError

OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
HOST = re.compile(r"(ssh://)?([A-Za-z0-9_][A-Za-z0-9._\-]*@)?(\[[A-Za-z0-9:.%]+\]|[A-Za-z0-9_][A-Za-z0-9._:%\-]*)")
HOST_PORT = re.compile(r"[^:]*:\d+")  # which ssh itself takes in its ssh:// form only; of an IPv6 address there are more colons

# What OpenSSH writes to stderr when it ends with 255, and what that means to the user; the first that fits.
MEANINGS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed since you last connected: find out why before you trust it"),
    ("Host key verification failed", "its host key is not known: connect once by hand (`ssh {host}`), compare the fingerprint, accept it"),
    ("Permission denied", "it refused your key: try `ssh {host}`, then `ssh-copy-id {host}`"),
    ("Too many authentication failures", "it refused your keys: name the right one in ~/.ssh/config (IdentityFile, IdentitiesOnly)"),
    ("Could not resolve hostname", "its name is not known: check the spelling, or your ~/.ssh/config"),
    (
        "Connection refused",
        "nothing listens for ssh there: check that the board is up, that sshd runs on it, and the Port in ~/.ssh/config",
    ),
    ("timed out", "it does not answer: is the board up and on this network?"),
    ("No route to host", "it is not reachable: is the board up and on this network?"),
    ("Network is unreachable", "it is not reachable: is this computer on the board's network?"),
    ("not responding", "the connection was lost"),
    ("Connection reset", "the connection was lost"),
    ("Connection closed", "the connection was lost"),
    ("Broken pipe", "the connection was lost"),
)


def checked_host(host: str) -> str:
    """The host as given. Raises UsageError unless it is HOST, USER@HOST or ssh://USER@HOST:PORT in plain characters."""
    if HOST_PORT.fullmatch(host):
        raise UsageError(f"host {host!r}: write a port as ssh://{host}, or put it into ~/.ssh/config.")
    if not HOST.fullmatch(host):
        raise UsageError(f"host {host!r} is not of the form USER@HOST: letters, digits and . _ - only, no leading dash.")
    return host


def argv(host: str, command: Sequence[str]) -> list[str]:
    """The ssh call that runs `command` on the host, each word quoted for the shell there. Raises UsageError for a bad host."""
    ssh = shlex.split(os.environ.get("PRUNECTL_SSH", "")) or ["ssh"]
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return [*ssh, "-T", *options, "--", checked_host(host), shlex.join(command)]


def meaning(host: str, stderr: str) -> str:
    """Why ssh itself failed (exit 255), from what it wrote, as half a sentence about the host."""
    for sign, text in MEANINGS:
        if sign.lower() in stderr.lower():
            return text.format(host=host)
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"ssh failed: {said[-1]}" if said else "the agent was killed there, or the connection was lost"
