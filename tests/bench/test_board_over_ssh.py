"""The whole way: host, ssh, sshd, agent under the board's Python, trtexec's words, and back."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import standin_board
from small_models import train_model
from standin_board import Waveform

from prunectl import files
from prunectl.bench import board as host_side
from prunectl.bench import ssh
from prunectl.bench.devices import devices
from prunectl.bench.energy import window_energy_mj
from prunectl.bench.records import Job, OnnxModel, Settings
from prunectl.bench.report import report
from prunectl.errors import DeviceUnavailable, UsageError

quiet = lambda text: None  # noqa: E731


def model(folder: Path, name: str, size: int) -> OnnxModel:
    """A file that the stand-in takes for a model; its latency is a millisecond for each 1000 bytes."""
    path = folder / name
    path.write_bytes(os.urandom(size))
    return OnnxModel(path, name)


@pytest.fixture
def dense(tmp_path: Path) -> OnnxModel:
    return model(tmp_path, "dense.onnx", 4000)


def test_two_models_over_ssh(board, sshd, short, tmp_path, dense, monkeypatch):
    board.set_trtexec(version=8201)
    hostile = model(tmp_path, "pruned 'model' \"50 %\" $(touch owned)\n.onnx", 2000)
    waves = {"VDD_IN": Waveform.random(3), "VDD_SYS_GPU": Waveform.random(4)}
    said = []
    with sshd(board) as server, board.powered(waves):
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
        # the last thing a login shell says is a title for the terminal, without an end of line
        greeting = r'echo "Welcome to Ubuntu 18.04"; printf "\033]0;tx2\007"; exec "$@"'
        banner = ("sh", "-c", greeting, "sh", standin_board.board_python())
        settings = short(repeats=3, refresh_probe_s=0.6, duration_s=1.0, python=banner)
        raw = devices.get("jetson")(Job((dense, hostile)), settings, target="board", say=said.append)
    assert board.leftovers() == []
    assert not list(tmp_path.rglob("owned"))
    assert raw.simulated and raw.environment["l4t"] == "32.7.1" and raw.environment["tensorrt"] == "8.2.1"
    assert raw.environment["python"].startswith("3.6") or standin_board.board_python() == sys.executable
    assert [w.artifact for w in raw.windows if w.kind == "load"] == [0, 1, 0, 1, 0, 1]  # interleaved
    assert not raw.artifacts[0].details["engine"]["cached"]
    assert "--workspace=1024" in raw.artifacts[0].details["engine"]["command"]

    wave = waves["VDD_IN"]
    for window in raw.windows:
        if window.kind == "load":
            truth = wave.integral(window.start_ns / 1e9, window.end_ns / 1e9)
            assert window_energy_mj(raw, window) == pytest.approx(truth, abs=board.tolerance_mj(wave, raw, window))

    result = report(raw)
    first, second = result.reports
    assert first.latency_ms["p50"] == pytest.approx(4.0, rel=0.01) and second.latency_ms["p50"] == pytest.approx(2.0, rel=0.01)
    assert first.energy.simulated and "simulated" in result.warnings[0]
    latency = next(r for r in result.ratios if r.metric == "latency_ms")
    assert (latency.numerator, latency.denominator) == (hostile.name, "dense.onnx")
    assert latency.median == pytest.approx(0.5, rel=0.01) and latency.differs
    assert first.energy.refresh_ms == pytest.approx(50, rel=0.2)


def here(board, monkeypatch) -> None:
    """From now on this machine is that board."""
    for name, value in board.env.items():
        monkeypatch.setenv(name, value)


def test_this_machine_as_the_board(board, short, dense, monkeypatch):
    here(board, monkeypatch)
    raw = host_side.measure(Job((dense,)), short(), host=None, say=quiet)
    assert report(raw).reports[0].latency_ms["p50"] == pytest.approx(4.0, rel=0.01)
    monkeypatch.undo()
    assert board.leftovers() == []


def test_an_engine_built_on_the_board_and_not_run(board, sshd, short, tmp_path, dense, monkeypatch):
    board.set_trtexec(version=8201, build_s=0.2)
    other = model(tmp_path, 'an "other"\n.onnx', 3000)
    with sshd(board) as server:
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
        first, second = host_side.build_engines((dense, other), short(precision="fp32"), host="board", say=quiet)
        said = []
        (again,) = host_side.build_engines((dense,), short(precision="fp32"), host="board", say=said.append)
    assert (first.name, second.name, first.onnx_sha256) == ("dense.onnx", other.name, dense.sha256)
    engine = Path(first.path)  # the board's file system is ours here
    assert board.cache in engine.parents and engine.stat().st_size == first.bytes and files.sha256(engine) == first.sha256
    assert engine.read_bytes() == b"ptrt" + dense.path.read_bytes()
    assert first.tensorrt == "8.2.1" and first.board == "quill" and first.simulated and "trtexec is a script" in first.simulated_by
    assert 0.2 <= first.build_s < 20 and not first.cached
    assert again == dataclasses.replace(first, cached=True) and not any("sending" in text for text in said)
    assert "--fp16" not in first.command
    assert board.leftovers() == []


# ------------------------------------------------------------------------------------------------- one sentence each


def refused(server, settings, job, monkeypatch, *, say=quiet, target="board") -> str:
    """What the failure says, after checking that it is one sentence and came before any time-out of ssh's."""
    if server:
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
    begin = time.monotonic()
    with pytest.raises(DeviceUnavailable) as caught:
        devices.get("jetson")(job, settings, target=target, say=say)
    assert time.monotonic() - begin < 30
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and target in message
    return message


def test_unreachable(board, sshd, short, dense, monkeypatch):
    with sshd(board) as server:
        pass
    assert "nothing listens" in refused(server, short(), Job((dense,)), monkeypatch)
    assert "its name is not known" in refused(server, short(), Job((dense,)), monkeypatch, target="nobody@no-such-board.invalid")


def test_key_refused(board, sshd, short, dense, monkeypatch):
    with sshd(board, accept="stranger") as server:
        assert "refused your key" in refused(server, short(), Job((dense,)), monkeypatch)


def test_host_key_unknown_or_changed(board, sshd, short, dense, monkeypatch, keys):
    with sshd(board) as server:
        kind, key = (keys / "stranger.pub").read_text().split()[:2]
        server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")
        assert "has changed" in refused(server, short(), Job((dense,)), monkeypatch)
        server.known_hosts.write_text("")
        assert "host key is not known" in refused(server, short(), Job((dense,)), monkeypatch)


def test_no_python_on_the_board(board, sshd, short, dense, monkeypatch):
    with sshd(board) as server:
        assert "no python3" in refused(server, short(python=("no-such-python3",)), Job((dense,)), monkeypatch)


def test_python_too_old(board, sshd, short, dense, monkeypatch):
    older = "import sys; sys.version_info = (3, 5, 2)\n"  # what a board with an older Python would say of itself
    wrapper = ("sh", "-c", f'shift; text=$1; shift; exec {sys.executable} -c "{older}$text" "$@"', "sh")
    with sshd(board) as server:
        assert "needs Python 3.6" in refused(server, short(python=wrapper), Job((dense,)), monkeypatch)


def test_an_agent_of_another_release(board, sshd, short, dense, monkeypatch):
    other = ("sh", "-c", """echo 'prunectl-agent:{"event": "hello", "protocol": 99, "python": "3.6.9"}'; cat > /dev/null""", "sh")
    with sshd(board) as server:
        assert "speaks protocol 99" in refused(server, short(python=other), Job((dense,)), monkeypatch)


def test_a_silent_board(board, sshd, short, dense, monkeypatch):
    with sshd(board) as server:
        mute = short(python=("sh", "-c", "exec cat > /dev/null", "sh"), slack_s=2.0)
        assert "hangs" in refused(server, mute, Job((dense,)), monkeypatch)
    assert board.leftovers() == []


def test_no_trtexec(board, sshd, short, dense, monkeypatch):
    board.trtexec.unlink()
    with sshd(board) as server:
        said = refused(server, short(), Job((dense,)), monkeypatch)
    assert "no trtexec at" in said and "bench.trtexec" in said
    assert board.leftovers() == []


def test_full_disk(board, sshd, short, tmp_path, monkeypatch):
    """The board's cache is a file system of 1 MB, really full."""
    full = (
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=1m none "$XDG_CACHE_HOME" && exec {standin_board.board_python()} "$@"',
        "sh",
    )
    (board.root / "home/.cache").mkdir()
    with sshd(board) as server:
        upload = model(tmp_path, "large.onnx", 3_000_000)
        assert "disk is full" in refused(server, short(python=full), Job((upload,)), monkeypatch)
        engine = model(tmp_path, "engine.onnx", 700_000)  # arrives, but its engine finds no room
        assert "disk is full" in refused(server, short(python=full), Job((engine,)), monkeypatch)
    assert board.leftovers() == []


def test_connection_cut_in_the_transfer(board, sshd, short, tmp_path, monkeypatch):
    large = model(tmp_path, "large.onnx", 60_000_000)

    def cut(text: str) -> None:
        if "sending" in text:
            threading.Timer(0.03, lambda: [os.kill(pid, signal.SIGKILL) for pid in clients(server)]).start()

    with sshd(board) as server:
        assert "ended before it had a result" in refused(server, short(), Job((large,)), monkeypatch, say=cut)
        assert board.leftovers() == []


def clients(server) -> list[int]:
    """Process ids of the ssh clients that use this server's configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] == b"ssh" and str(server.config).encode() in words:
                found.append(int(entry.name))
    return found


def test_noise_of_a_login_shell_is_no_missing_python(board, sshd, short, dense, monkeypatch):
    noisy = ("sh", "-c", 'echo "/home/nvidia/.bashrc: line 118: nvcc: command not found" >&2; exit 3', "sh")
    with sshd(board) as server:
        said = refused(server, short(python=noisy), Job((dense,)), monkeypatch)
    assert "no python3" not in said and "exit code 3" in said


def test_a_long_answer_over_a_slow_link_is_waited_for():
    """A byte now and then is no silence: a second and a half of them, where half a second of silence is the end."""
    slow = "import os, time\nos.write(1, b'prunectl-agent:{')\nfor _ in range(15): time.sleep(0.1); os.write(1, b' ')\n"
    slow += 'os.write(1, b\'"event": "result"}\\n\')'
    with host_side._Agent([sys.executable, "-c", slow], None, 0.5) as agent:
        assert agent.event(None)["event"] == "result"
    silent = [sys.executable, "-c", "import time; time.sleep(1.5)"]
    with host_side._Agent(silent, None, 0.5) as agent, pytest.raises(DeviceUnavailable, match="hangs"):
        agent.event(None)


def test_training_that_fails_later_costs_no_measurement(board, short, dense, tmp_path, monkeypatch):
    """Whole repeats of it stay, and the inferences; the unfinished one goes."""
    trainer, calls = tmp_path / "trainer.sh", tmp_path / "calls"
    stamps = '{"loss": 1.0, "torch": "1.10", "stamps": [1.0, 1.1, 1.2]}'
    trainer.write_text(
        f"#!/bin/sh\necho >> {calls}\n[ $(wc -l < {calls}) -lt 4 ] && echo 'RESULT {stamps}' || {{ echo out of memory; exit 1; }}\n"
    )
    trainer.chmod(0o755)
    for name, value in board.env.items():
        monkeypatch.setenv(name, value)
    tasks = (train_model("dense", 8), train_model("pruned", 4))
    settings = short(repeats=3, train_python=str(trainer), python=(standin_board.board_python(),))
    raw = host_side.measure(Job((dense,), tasks), settings, host=None, say=quiet)
    assert [w.repeat for w in raw.windows if w.kind == "train"] == [0, 0] and "ran out of memory" in str(raw.train_reason)
    assert [w.repeat for w in raw.windows if w.kind == "load"] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- host names


def test_a_port_is_said_as_ssh_takes_it():
    with pytest.raises(UsageError, match="ssh://nvidia@tx2:2222"):
        ssh.argv("nvidia@tx2:2222", ["true"])


@pytest.mark.parametrize(
    "host", ["", "-oProxyCommand=touch owned", "a b", "a;b", "$(id)", "a\nb", "user@-oProxyCommand=x", "-l@host", "a`id`", "a'b", "@"]
)
def test_hostile_host_names(host):
    with pytest.raises(UsageError, match="not of the form USER@HOST"):
        ssh.argv(host, ["true"])


@pytest.mark.parametrize(
    "host", ["tx2", "nvidia@192.168.1.7", "ubuntu@tx2.local", "my_alias", "ssh://nvidia@tx2:2222", "nvidia@[fe80::1%eth0]"]
)
def test_plain_host_names(host):
    assert ssh.argv(host, ["true"])[-2:] == [host, "true"]


def test_words_reach_the_remote_shell_quoted():
    words = ["python3", "-c", "print('a b')", "$HOME", "x\ny", "--"]
    line = ssh.argv("tx2", words)[-1]
    said = subprocess.run(["sh", "-c", f'set -- {line}; for word in "$@"; do printf "%s\\0" "$word"; done'], capture_output=True, text=True)
    assert said.stdout.split("\0")[:-1] == words


def test_options_never_weaken_ssh():
    line = " ".join(ssh.argv("tx2", ["true"])).lower()
    assert "batchmode=yes" in line and "stricthostkeychecking" not in line and "userknownhostsfile" not in line


def test_no_board_named(monkeypatch):
    monkeypatch.delenv("PRUNECTL_JETSON", raising=False)
    with pytest.raises(DeviceUnavailable, match=r"no Jetson.*--host.*PRUNECTL_JETSON"):
        devices.get("jetson")(Job(), Settings(), say=quiet)
