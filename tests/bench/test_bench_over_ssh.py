"""`prunectl bench --device jetson` as a user types it: a real sshd, the agent under the board's Python, sysfs that moves by a known
waveform. trtexec and the sensors are the stand-ins of this folder, so every report here says simulated."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import standin_board
from running import TINY, prunectl
from small_models import onnx_model
from standin_board import Waveform

from prunectl.bench.records import RawBench

PYTHON = standin_board.board_python()
HASTE = ("--device", "jetson", "--host", "board", "--set", f"bench.python=[{PYTHON}]", "--set", "bench.idle_s=0.2")
HASTE += ("--set", "bench.refresh_probe_s=0.4", "--warmup", "0.2", "--repeats", "1", "--set", "bench.iterations=5")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a dense network and a ticket; what they classify does not matter here."""
    out = tmp_path_factory.mktemp("found")
    done = prunectl("find-ticket", "resnet8", "fashion-mini", *TINY, "--epochs", "2", "--detector", "epoch:1", "--out", out)
    assert done.code == 0, done.err
    return out / "latest"


@pytest.fixture
def files(tmp_path):
    """Two ONNX files whose names a shell, ssh and trtexec could stumble over."""
    folder = tmp_path / 'it\'s "here"\n$(touch owned)'
    folder.mkdir()
    return [onnx_model(folder, name, width).path for name, width in (("dense 'v 1'\n", 64), ("pruned", 16))]


@pytest.fixture
def at_the_board(board, sshd, monkeypatch, tmp_path):
    with sshd(board) as server:
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
        yield board
    assert board.leftovers() == []
    assert not list(tmp_path.rglob("owned")) and not Path("owned").exists()


def measured(*words):
    done = prunectl("bench", *words, "--json")
    assert done.code == 0, done.err
    return done.document


def truth_mj(document, board, wave, artifact):
    """Energy of one inference by the waveform's exact integral, the median of the windows that were measured, and how far what the
    sensor saw may be from it."""
    raw = RawBench.read(Path(document["raw"]))
    windows = [w for w in raw.windows if w.kind == "load" and w.artifact == artifact]
    truth = statistics.median(wave.integral(w.start_ns / 1e9, w.end_ns / 1e9) / len(w.latency_ns) for w in windows)
    return truth, max(board.tolerance_mj(wave, raw, w) / len(w.latency_ns) for w in windows)


# --------------------------------------------------------------------------------------------------------- it measures


@pytest.mark.parametrize(("layout", "profile"), [("tx2", "tx2"), ("orin", "orin")])
def test_a_run_on_a_board(layout, profile, tmp_path, sshd, run, monkeypatch):
    """Dense and ticket, exported for the board that answers, in either layout of the sensors, whatever the iio numbers."""
    if layout == "tx2":
        board = standin_board.tx2(tmp_path / "board", iio=(4, 1), unplugged="VDD_4V0_WIFI")
    else:
        board = standin_board.orin(tmp_path / "board")
        (board.root / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.0, GCID: 1, BOARD: generic\n")
    board.set_trtexec(version=8601, bytes_per_ms=100_000.0)
    wave = Waveform(6000, ((300, 3.0, 0.4),), (400, 0.4, 0.5))  # fast, so that a window of 1 s holds some of its periods
    with sshd(board) as server, board.powered({"VDD_IN": wave}, quantum_mw=5):
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
        document = measured(run, *HASTE, "--duration", "1", "--repeats", "3")
    assert board.leftovers() == []
    assert document["simulated"] and "simulated" in document["warnings"][0] and document["run"] == str(run.resolve())
    dense, ticket = document["reports"]
    assert (dense["artifact"], ticket["artifact"], dense["precision"]) == ("dense", "compact", "fp16")
    for i, report in enumerate((dense, ticket)):
        energy = report["energy"]
        truth, allowed = truth_mj(document, board, wave, i)
        assert energy["mj_per_inference"] == pytest.approx(truth, abs=allowed)
        assert energy["simulated"] and energy["source"].startswith("ina3221") and energy["reason"] is None
        assert report["sha256"] and (run / "export" / f"{report['artifact']}-{profile}-fp32.onnx").is_file()
    environment = dense["environment"]
    assert environment["python"].startswith("3.6") or sys.executable == PYTHON
    ratio = next(r for r in document["ratios"] if r["metric"] == "latency_ms")
    assert ratio["numerator"] == "compact" and ratio["median"] < 0.9
    assert any("VDD_4V0_WIFI was left out" in w for w in document["warnings"]) == (layout == "tx2")
    assert document["train_total_j"] == {"dense": None, "ticket": None, "ratio": None, "reason": "needs --train"}
    replayed = measured("--device", f"replay:{document['raw']}")
    assert replayed["reports"] == document["reports"] and replayed["ratios"] == document["ratios"]


def test_real_inference_and_a_hostile_path(at_the_board, files):
    """The stand-in runs ONNX Runtime; the path has spaces, quotes, a command and newlines."""
    at_the_board.set_trtexec(version=8601, mode="onnxruntime")
    document = measured(*files, *HASTE, "--duration", "0.5", "--precision", "fp32")
    assert [r["artifact"] for r in document["reports"]] == ["dense 'v 1'\n", "pruned"]
    assert document["ratios"][0]["median"] < 0.7  # less than a tenth of the work
    raw = RawBench.read(Path(document["raw"]))
    assert "--fp16" not in raw.artifacts[0].details["engine"]["command"] and document["settings"]["precision"] == "fp32"


def test_settings_reach_trtexec(at_the_board, tmp_path, monkeypatch):
    """Of a recipe, of --set; the board from the environment; a free batch."""
    moved = at_the_board.root / "opt" / "trtexec"
    shutil.copytree(at_the_board.trtexec.parent, moved.parent)
    at_the_board.trtexec.unlink()
    free = onnx_model(tmp_path, "free", 8, batch="N").path
    monkeypatch.setenv("PRUNECTL_JETSON", "board")
    words = [w for w in HASTE if w not in ("--host", "board")]
    document = measured(
        free, *words, "--recipe", "jetson-orin", "--batch", "4", "--duration", "0.3",
        "--set", f"bench.trtexec={moved}", "--set", "bench.workspace_mb=64", "--set", "bench.sparsity=enable",
    )  # fmt: skip
    command = RawBench.read(Path(document["raw"])).artifacts[0].details["engine"]["command"]
    assert command[0] == str(moved) and "--memPoolSize=workspace:64" in command and "--sparsity=enable" in command
    assert "--optShapes=input:4x3x32x32" in command and document["reports"][0]["batch"] == 4


def test_training_on_the_board(at_the_board, run):
    """Joules of a step and of the whole training, the agent's trainer in another Python's torch."""
    wave = Waveform(5000, ((200, 2.0, 0.0),))
    with at_the_board.powered({"VDD_IN": wave}):
        document = measured(
            run, *HASTE, "--duration", "0.3", "--train", "--set", f"bench.train_python={sys.executable}", "--set", "bench.train_steps=8"
        )
    raw = RawBench.read(Path(document["raw"]))
    steps = {r["artifact"]: r["train"] for r in document["reports"] if r["train"]}
    for i, artifact in enumerate(raw.artifacts):
        if artifact.kind == "traced":
            (window,) = [w for w in raw.windows if w.artifact == i]
            assert artifact.batch == 50  # the run's own
            truth = wave.integral(window.start_ns / 1e9, window.end_ns / 1e9) / 8
            allowed = at_the_board.tolerance_mj(wave, raw, window) / 8
            assert steps[artifact.name]["mj_per_step"] == pytest.approx(truth, abs=allowed)
    total, t = document["train_total_j"], raw.training
    assert (t.dense_steps, t.ticket_steps) == (pytest.approx(8), pytest.approx(4)) and t.search_steps > 4 and total["reason"] is None
    dense, ticket = steps["dense"]["mj_per_step"], steps["compact"]["mj_per_step"]
    assert total["dense"] == pytest.approx(dense * 8 / 1e3) and total["ratio"] == pytest.approx(total["ticket"] / total["dense"])
    assert total["ticket"] == pytest.approx((dense * t.search_steps + ticket * 4) / 1e3)


# --------------------------------------------------------------------------------------- what goes wrong is one sentence


@pytest.mark.parametrize(
    ("mode", "words", "settings"),
    [
        ("crash-build", ("building the engine of pruned, failed with exit code 1",), ()),
        ("oom-build", ("Killed", "workspace cap"), ()),
        ("hang-build", ("gave no result within 1 s",), ("--set", "bench.build_timeout_s=1")),
        ("garbage-build", ("wrote no engine",), ()),
        ("crash-run", ("timing pruned, failed",), ()),
        ("oom-run", ("Killed", "the batch"), ()),
        ("hang-run", ("gave no result within",), ("--set", "bench.slack_s=2.5")),
        ("garbage-run", ("wrote no inference times",), ()),
    ],
)
def test_trtexec_fails(at_the_board, files, mode, words, settings):
    at_the_board.set_trtexec(version=8601, mode=mode)
    begin = time.monotonic()
    prunectl("bench", files[1], *HASTE, "-q", "--duration", "0.2", *settings).refused(5, "board: ", *words)
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("host", ["-oProxyCommand=touch owned", "a;b", "$(touch owned)", "a\nb", ""])
def test_hostile_hosts(at_the_board, files, host):
    prunectl("bench", files[1], "--device", "jetson", f"--host={host}").refused(2, "not of the form USER@HOST")


def test_no_board(files, monkeypatch):
    monkeypatch.delenv("PRUNECTL_JETSON", raising=False)
    prunectl("bench", files[1], "--device", "jetson").refused(5, "no Jetson", "--host", "$PRUNECTL_JETSON")


def verb(*words):
    """The installed command in a process of its own, its words as they come."""
    command = [sys.executable, "-m", "prunectl", "bench", *map(str, words), "-v"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def when(process, words, act):
    """Runs `act` a moment after the command has said `words`; its last line on stderr, and its exit code."""
    for line in process.stdout:
        if words in line:
            threading.Timer(0.5, act).start()
            break
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    return process.returncode, err.strip().splitlines()[-1]


@pytest.mark.parametrize(("phase", "fault"), [("building", "cut"), ("repeat 1", "cut"), ("repeat 1", "kill"), ("repeat 1", "interrupt")])
def test_ended_in_the_middle(at_the_board, files, phase, fault):
    """The connection is cut, the agent is killed, the user has enough: nothing stays on the board (the fixture looks)."""
    at_the_board.set_trtexec(version=8601, build_s=30.0 if phase == "building" else 0.0)
    process = verb(files[1], *HASTE, "--duration", "30")

    def act():
        if fault == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
        elif fault == "kill":
            os.kill(next(pid for pid in at_the_board.agents() if "python" in os.readlink(f"/proc/{pid}/exe")), signal.SIGKILL)
        else:
            for pid in subprocess.run(["pgrep", "-P", str(process.pid), "-x", "ssh"], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)

    code, said = when(process, phase, act)
    expected = {"cut": (5, "board"), "kill": (5, "the agent was killed there"), "interrupt": (130, "interrupted")}[fault]
    assert code == expected[0] and said.startswith("error: ") and expected[1] in said


def test_the_second_bench_is_refused_and_the_first_goes_on(at_the_board, files):
    first = verb(files[1], *HASTE, "--duration", "6")
    refusals = []
    code, _ = when(first, "repeat 1", lambda: refusals.append(prunectl("bench", files[1], *HASTE, "-q")))
    assert code == 0
    refusals[0].refused(5, "another bench is running on this board")


def test_a_sensor_that_stops(at_the_board, files):
    """Power is null with the reason; latency is not lost."""
    with at_the_board.powered({"VDD_IN": Waveform.random(8)}) as sensor:
        process = verb(files[1], *HASTE, "--duration", "4", "--json")
        for line in process.stderr:
            if "repeat 1" in line:
                sensor.kill()
                break
        out, _ = process.communicate(timeout=60)
    found = json.loads(out)["reports"][0]
    assert found["energy"]["mj_per_inference"] is None and "does not update" in found["energy"]["reason"] and found["latency_ms"]["p50"] > 0


# ----------------------------------------------------------------------------------------------- a minute, in real time


@pytest.mark.slow  # more than a minute in real time; test_board_over_ssh.py has shorter windows
def test_two_minutes_of_joules_at_once(tmp_path, sshd, monkeypatch):
    """Two boards side by side, each for 60 s: joules by the verb against the waveform's integral, within 1 % where the sensor
    refreshes every 50 ms and within 3 % where every 450 ms. (18 more waveforms in simulated time: test_bench_stats.py.)"""
    file = onnx_model(tmp_path, "network", 16).path
    cases = [("tx2", 0.05, 0.01, 8201, 11), ("orin", 0.45, 0.03, 8501, 12)]
    running = []
    with contextlib.ExitStack() as stack:
        for layout, refresh_s, bound, version, seed in cases:
            (tmp_path / layout).mkdir()
            board = getattr(standin_board, layout)(tmp_path / layout / "board")
            board.set_trtexec(version=version)
            wave = Waveform.random(seed)
            server = stack.enter_context(sshd(board))
            stack.enter_context(board.powered({"VDD_IN": wave}, refresh_s=refresh_s, quantum_mw=5))
            monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
            words = (*HASTE, "--duration", "60", "--warmup", "1", "--set", "bench.refresh_probe_s=5", "--out", tmp_path / layout, "--json")
            running.append((board, wave, refresh_s, bound, verb(file, *words)))
        documents = [json.loads(process.communicate(timeout=200)[0]) for *_, process in running]
    for (board, wave, refresh_s, bound, _), document in zip(running, documents, strict=True):
        truth, _ = truth_mj(document, board, wave, 0)
        energy = document["reports"][0]["energy"]
        print(f"refresh {refresh_s} s: {energy['mj_per_inference'] / truth - 1:+.3%} of {truth:.2f} mJ")
        assert energy["mj_per_inference"] == pytest.approx(truth, rel=bound)
        assert energy["refresh_ms"] == pytest.approx(refresh_s * 1e3, rel=0.1)
        assert document["simulated"] and board.leftovers() == []
