"""Boards in folders, and real sshds on loopback that lead to them."""

import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import standin_board

from prunectl.bench.records import Settings

# For the machinery only; what a bench measures is tested with longer windows.
SHORT = {"warmup_s": 0.1, "duration_s": 0.2, "iterations": 5, "repeats": 1, "idle_s": 0.2, "refresh_probe_s": 0.2, "build_timeout_s": 60.0}


@pytest.fixture
def board(tmp_path: Path) -> Iterator[standin_board.Board]:
    """A TX2 whose TensorRT is 8.6, which can do windows of a fraction of a second."""
    made = standin_board.tx2(tmp_path / "board")
    made.set_trtexec(version=8601)
    yield made
    for line in made.running():  # of a test that failed
        os.kill(int(line.split()[0]), 9)


@dataclasses.dataclass(frozen=True)
class Server:
    """A running sshd and the way to it: what goes into $PRUNECTL_SSH."""

    config: Path
    port: int
    known_hosts: Path

    @property
    def ssh(self) -> str:
        return f"ssh -F {self.config}"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name], check=True)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def sshd(keys: Path, tmp_path: Path) -> Callable[..., contextmanager]:
    """serve(board): an sshd that runs commands as on that board; strict host keys on the client's side."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    assert os.path.exists(program), "these tests need sshd: apt-get install -y openssh-server"
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # sshd wants it there when root starts it

    @contextmanager
    def serve(board: standin_board.Board, *, accept: str = "user", **env: str) -> Iterator[Server]:
        folder = board.root.parent
        port = free_port()
        shutil.copy(keys / f"{accept}.pub", folder / "authorized_keys")
        variables = {"HOME": str(board.root / "home"), **board.env, **env}
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nAuthorizedKeysFile {folder / 'authorized_keys'}\n"
            f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            + "SetEnv " + " ".join(f'{name}="{value}"' for name, value in variables.items()) + "\n"
        )  # fmt: skip
        known = folder / "known_hosts"
        kind, key = (keys / "host.pub").read_text().split()[:2]
        known.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
        config = folder / "ssh_config"
        config.write_text(
            f"Host board\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {keys / 'user'}\n"
            f" IdentitiesOnly yes\n UserKnownHostsFile {known}\n GlobalKnownHostsFile /dev/null\n StrictHostKeyChecking yes\n"
        )
        with (folder / "sshd.log").open("wb") as log:
            process = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                with socket.socket() as s:
                    if s.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield Server(config, port, known)
        finally:
            process.terminate()
            process.wait()

    return serve


@pytest.fixture
def short() -> Callable[..., Settings]:
    """short(...): Settings with windows of a second and the board's Python."""
    return lambda **changes: Settings(**({**SHORT, "python": (standin_board.board_python(),)} | changes))
