"""deploy/agent.py by hand, under the board's Python, on boards in folders."""

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standin_board
from standin_board import AGENT, Board, Waveform
from trtexec_flags import FLAGS

from prunectl.bench.records import RawBench

PYTHON = standin_board.board_python()
HASTE = ["--warmup-s", "0.1", "--duration-s", "0.2", "--repeats", "1", "--idle-s", "0.1", "--refresh-probe-s", "0.1"]


@pytest.fixture(scope="module")
def agent():
    """The agent as a module, for its pure functions."""
    spec = importlib.util.spec_from_file_location("agent", AGENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A TX2 whose TensorRT is 8.6, which can do windows of a fraction of a second."""
    made = standin_board.tx2(tmp_path / "board")
    made.set_trtexec(version=8601)
    return made


def call(board: Board, *words: object, **popen: object) -> subprocess.Popen:
    argv = [PYTHON, str(AGENT), *map(str, words)]
    return subprocess.Popen(argv, env={**os.environ, **board.env}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)


def bench(board: Board, *words: object) -> dict:
    """The raw record of `agent.py bench`."""
    process = call(board, "bench", *HASTE, *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def refusal(board: Board, *words: object) -> str:
    process = call(board, "bench", *HASTE, *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5 and out == "", err
    return err


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense 'v1'\n.onnx"
    path.write_bytes(os.urandom(4000))
    return path


# ------------------------------------------------------------------------------------------------- what it is made of


def test_standard_library_only_and_short():
    text = AGENT.read_text()
    imported = {name for node in ast.walk(ast.parse(text)) for name in _imports(node)}
    assert imported <= set(sys.stdlib_module_names)
    assert text.count("\n") < 700


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_vermin_finds_nothing_newer_than_python_36():
    vermin = shutil.which("vermin", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert vermin, "this test needs vermin: pip install -e '.[dev]'"
    said = subprocess.run(
        [vermin, "-t=3.6-", "--violations", str(AGENT), str(AGENT.with_name("trainer.py"))], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout


def test_the_trainer_is_python_36_too(tmp_path):
    shutil.copy(AGENT.with_name("trainer.py"), tmp_path)
    assert subprocess.run([PYTHON, "-m", "py_compile", str(tmp_path / "trainer.py")]).returncode == 0


# ------------------------------------------------------------------------------------------------- TensorRT's dialects


@pytest.mark.parametrize("version", sorted(FLAGS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("spin_wait", [False, True])
def test_every_flag_is_known_to_its_trtexec(agent, version, precision, spin_wait):
    request = dict(agent.DEFAULTS, precision=precision, sparsity="enable", spin_wait=spin_wait)
    parts = (
        (version // 1000, version // 100 % 10, version % 100)
        if version < 10000
        else (version // 10000, version // 100 % 100, version % 100)
    )
    build = agent.build_command(parts, "trtexec", "m.onnx", "m.plan", "t.cache", request, 1024, "input:1x3x32x32")
    run = agent.run_command(parts, "trtexec", "m.plan", "t.json", request, "input:1x3x32x32")
    for command in (build, run):
        assert {word[2:].split("=")[0] for word in command[1:]} <= FLAGS[version]


@pytest.mark.parametrize("version", [8201, 110100])
def test_the_oldest_and_the_newest_tensorrt(board, dense, version):
    board.set_trtexec(version=version)
    raw = bench(board, dense)
    assert raw["environment"]["tensorrt"] == {8201: "8.2.1", 110100: "11.1.0"}[version]
    assert raw["windows"][-1]["latency_ns"][0] == pytest.approx(4e6, rel=0.01)


def test_from_tensorrt_11_on_the_file_says_what_it_computes_in(board, dense):
    board.set_trtexec(version=110100)
    assert bench(board, dense, "--precision", "int8")["artifacts"][0]["precision"] == "as exported"


@pytest.mark.parametrize("version", [8501, 8601])
def test_the_batch_is_what_the_engine_takes(board, dense, version):
    """trtexec says so in other words from 8.6 on (samples/common/sampleInference.cpp)."""
    board.set_trtexec(version=version, batch=8)
    assert bench(board, dense)["artifacts"][0]["batch"] == 8
    assert "takes 8 images a call, not 4" in refusal(board, dense, "--batch", "4")


def test_a_line_before_trtexecs_own(board, dense):
    text = board.trtexec.read_text().split("\n", 1)
    board.trtexec.write_text(
        text[0] + "\nprint('ERROR: ld.so: object from LD_PRELOAD cannot be preloaded: ignored.', flush=True)\n" + text[1]
    )
    assert bench(board, dense)["environment"]["tensorrt"] == "8.6.1"


def test_files_of_one_name_keep_their_folders(board, tmp_path):
    paths = [tmp_path / kind / "model.onnx" for kind in ("dense", "compact")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(os.urandom(2000))
    raw = bench(board, *paths)
    assert [a["name"] for a in raw["artifacts"]] == list(map(str, paths)) and RawBench.from_dict(raw)


def test_a_name_that_is_not_ascii_in_a_locale_that_is(board, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    path = tmp_path / "réseau.onnx"
    path.write_bytes(os.urandom(2000))
    raw = bench(board, path)
    assert raw["artifacts"][0]["name"] == "réseau.onnx" and RawBench.from_dict(raw)


def test_a_folder_that_is_not_there_is_said_before_the_bench(board, dense, tmp_path):
    started = time.monotonic()
    assert "its folder is not there" in refusal(board, dense, "--duration-s", "30", "-o", tmp_path / "results" / "raw.json")
    assert time.monotonic() - started < 20


def test_a_damaged_note_beside_an_engine_has_it_built_again(board, dense):
    bench(board, dense)
    (note,) = board.cache.glob("engines/*.plan.json")
    for damage in ("{", '{"build_s": 1}'):
        note.write_text(damage)
        assert not bench(board, dense)["artifacts"][0]["engine"]["cached"]


def test_another_boards_session_in_a_shared_home_is_left_alone(board):
    others, mine = (board.cache / f"session-{os.uname().nodename}-{tail}" for tail in ("2-4711", "4711"))
    others.mkdir(parents=True)
    mine.mkdir()
    bench(board)
    assert others.is_dir() and not mine.exists()


def test_tensorrt_7_is_refused(board, dense):
    text = board.trtexec.read_text().replace('SETTINGS.get("version", 8201)', "7103").replace("FLAGS[VERSION]", "COMMON")
    board.trtexec.write_text(text)
    assert "TensorRT 7.1 is too old" in refusal(board, dense)


def test_the_warm_up_is_left_out(board, dense):
    """8.2 exports the warm-up's rows as well."""
    board.set_trtexec(version=8201)
    raw = bench(board, dense, "--warmup-s", "0.5")
    window = raw["windows"][-1]
    assert (window["end_ns"] - window["start_ns"]) / 1e9 == pytest.approx(1.0, abs=0.1)
    assert sum(window["latency_ns"]) / 1e9 <= (window["end_ns"] - window["start_ns"]) / 1e9


# -------------------------------------------------------------------------------------------------------------- sensors


@pytest.mark.parametrize(("iio", "unplugged"), [((0, 1), None), ((3, 2), None), ((1, 0), "VDD_4V0_WIFI")])
def test_rails_of_l4t_r32_by_name(tmp_path, iio, unplugged):
    board = standin_board.tx2(tmp_path / "board", iio=iio, unplugged=unplugged)
    board.sensor_files()["VDD_IN"].write_text("4321\n")
    raw = bench(board)
    names = [rail["name"] for rail in raw["power"]["rails"]]
    assert names[0] == "VDD_IN" and set(names) == {*standin_board.RAILS_40, *standin_board.RAILS_41} - {unplugged}
    assert set(raw["power"]["values"]["VDD_IN"]) == {4321}
    assert [rail["name"] for rail in raw["power"]["skipped"]] == ([unplugged] if unplugged else [])
    assert raw["environment"]["nvpmodel"] == {"name": "MAXN", "id": 0} and raw["environment"]["board"] == "quill"
    assert "temp_PMIC-Die_mc" not in raw["telemetry"]["values"] and set(raw["telemetry"]["values"]["gpu_hz"]) == {1300500000}


def test_rails_of_jetpack_5_and_6(tmp_path):
    board = standin_board.orin(tmp_path / "board")
    raw = bench(board)
    assert [rail["name"] for rail in raw["power"]["rails"]] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert raw["power"]["source"] == "ina3221-hwmon"
    assert set(raw["power"]["values"]["VDD_IN"]) == {1500.0}  # 5000 mV * 300 mA
    assert raw["power"]["rails"][0]["step_mw"] == 40.0  # 40 uV / 5 mOhm = 8 mA at 5 V


@pytest.mark.parametrize(
    ("line", "milliwatts"),
    [
        (
            "RAM 1004/7852MB (lfb 7x2MB) CPU [0%@350,4%@345,2%@499] EMC_FREQ 17%@40 GR3D_FREQ 0%@114 APE 150 PLL@34C PMIC@100C "
            "thermal@33.2C VDD_SYS_GPU 153/153 VDD_SYS_SOC 383/383 VDD_IN 1876/1876 VDD_SYS_DDR 134/134",
            {"VDD_IN": 1876, "VDD_SYS_GPU": 153, "VDD_SYS_SOC": 383, "VDD_SYS_DDR": 134},
        ),
        (
            "RAM 2448/15388MB (lfb 2846x4MB) SWAP 0/7694MB (cached 0MB) CPU [1%@729,off] GR3D_FREQ 0% cpu@45.8C "
            "VDD_IN 4722mW/4722mW VDD_CPU_GPU_CV 720mW/720mW VDD_SOC 1421mW/1421mW",
            {"VDD_IN": 4722, "VDD_CPU_GPU_CV": 720, "VDD_SOC": 1421},
        ),
    ],
)
def test_tegrastats_where_no_file_answers(board, line, milliwatts):
    shutil.rmtree(board.root / "sys/bus")
    tegrastats = board.root / "usr/bin/tegrastats"
    standin_board.write(tegrastats, f"#!/bin/sh\nwhile sleep 0.05; do echo '{line}'; done")
    tegrastats.chmod(0o755)
    raw = bench(board)
    assert raw["power"]["source"] == "tegrastats"
    assert {name: set(values) for name, values in raw["power"]["values"].items()} == {name: {mw} for name, mw in milliwatts.items()}
    assert len(raw["power"]["t_ns"]) >= 5
    assert board.leftovers() == []


def test_rapl_of_a_desktop_cpu(board):
    shutil.rmtree(board.root / "sys/bus")
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:1:0", "core"),
    ):
        folder = board.root / "sys/class/powercap" / zone
        standin_board.write(folder / "name", name)
        standin_board.write(folder / "energy_uj", 123456)
        standin_board.write(folder / "max_energy_range_uj", 262143328850)
    raw = bench(board)
    assert raw["power"]["source"] == "rapl"
    assert [rail["name"] for rail in raw["power"]["rails"]] == ["package-0", "core-0", "package-1", "core-1"]
    assert raw["power"]["rails"][0] == {"name": "package-0", "unit": "uJ", "wrap": 262143328850, "step_mw": None}


def test_no_sensor_is_a_reason_and_not_a_zero(board, dense):
    shutil.rmtree(board.root / "sys/bus")
    raw = bench(board, dense)
    assert raw["power"]["source"] is None and raw["power"]["reason"].startswith("no power sensor answers: looked for INA3221")
    assert raw["power"]["t_ns"] == [] and [w["kind"] for w in raw["windows"]] == ["load"]


def test_a_rail_that_goes_away_is_null_from_then_on(board):
    gone = board.sensor_files()["VDD_SYS_DDR"]
    process = call(board, "sample", "--root", board.root, stdin=subprocess.PIPE)
    assert json.loads(process.stdout.readline())["source"] == "ina3221-iio"
    time.sleep(0.3)
    gone.write_text("")
    time.sleep(0.3)
    seen = json.loads(process.communicate(timeout=10)[0])
    values = seen["values"]["VDD_SYS_DDR"]
    assert values[0] == 1002 and values[-1] is None and None not in seen["values"]["VDD_IN"]


def test_the_sampler_is_cheap(board):
    """20 Hz on six rails: under 2 % of a core, by the kernel's own account of the process."""
    process = call(board, "sample", "--root", board.root, stdin=subprocess.PIPE)
    process.stdout.readline()
    ticks, begin = cpu_ticks(process.pid), time.monotonic()
    time.sleep(4.0)
    share = (cpu_ticks(process.pid) - ticks) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin)
    seen = json.loads(process.communicate(timeout=10)[0])
    assert share < 0.02
    assert seen["sampler"]["cpu_s"] / seen["sampler"]["wall_s"] < 0.02
    assert 50 < len(seen["t_ns"]) < 95  # 80 on a machine that is not busy


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# ---------------------------------------------------------------------------------------------- how it ends, and stays


def running_bench(board: Board, dense: Path, **popen: object) -> subprocess.Popen:
    """An agent in the middle of a long window."""
    process = call(board, "bench", dense, *HASTE, "--duration-s", "60", **popen)
    for line in process.stderr:
        if "repeat 1" in line:
            break
    time.sleep(0.5)
    assert board.running()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_it_is_ended_nothing_stays(board, dense, number):
    process = running_bench(board, dense)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert board.leftovers() == []


def test_killed_while_the_guard_was_not_running(board, dense):
    """A busy board wakes the guard late: the agent is dead and buried, and nobody listens any more."""
    process = running_bench(board, dense)
    guard = board.agents()[1]
    os.kill(guard, signal.SIGSTOP)
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    process.stderr.close()
    os.kill(guard, signal.SIGCONT)
    assert board.leftovers() == []


def test_nobody_listens_any_more(board, dense):
    process = running_bench(board, dense)
    process.stdout.close()
    process.wait(timeout=10)
    process.stderr.close()
    assert board.leftovers() == []


def test_the_guard_killed_too(board, dense):
    """What a power cut leaves, the next bench clears."""
    process = running_bench(board, dense)
    agent, guard, *_ = board.agents()
    os.kill(guard, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    process.communicate(timeout=10)
    for line in board.running():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert list(board.cache.glob("session-*"))
    bench(board)
    assert board.leftovers() == []


def test_the_sampler_killed_is_a_reason(board, dense):
    process = call(board, "bench", dense, *HASTE, "--duration-s", "2")
    for line in process.stderr:
        if "repeat 1" in line:
            break
    time.sleep(0.3)
    assert len(board.agents()) == 3
    os.kill(board.agents()[-1], signal.SIGKILL)
    out = process.communicate(timeout=30)[0]
    raw = json.loads(out)
    assert raw["power"]["reason"] == "the sampler process died" and raw["power"]["source"] is None
    assert raw["windows"][-1]["latency_ns"]
    assert board.leftovers() == []


def test_a_second_bench_is_refused(board, dense):
    first = running_bench(board, dense)
    assert "another bench is running on this board" in refusal(board, dense)
    first.kill()
    first.communicate()
    assert board.leftovers() == []
    assert bench(board)["windows"]  # and allowed again at once


def test_an_engine_is_built_once(board, dense):
    first, second = bench(board, dense), bench(board, dense)
    assert [raw["artifacts"][0]["engine"]["cached"] for raw in (first, second)] == [False, True]
    assert first["artifacts"][0]["engine"]["command"] == second["artifacts"][0]["engine"]["command"]
    (engine,) = board.cache.rglob("*.plan")
    engine.write_bytes(b"")  # as a power cut can leave it
    assert not bench(board, dense)["artifacts"][0]["engine"]["cached"]


def test_build_alone(board, dense, tmp_path):
    """No window, no sensor; the next bench finds the engine."""
    process = call(board, "build", dense, "-o", tmp_path / "built.json")
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 0
    (engine,) = json.loads((tmp_path / "built.json").read_text())["engines"]
    assert Path(engine["path"]).stat().st_size == engine["bytes"] and not engine["cached"]
    found = bench(board, dense)["artifacts"][0]["engine"]
    assert found["cached"] and found["path"] == engine["path"]
    assert board.leftovers() == []


def test_a_trtexec_named_from_where_the_user_stands(board, dense):
    """Tools run in the session's folder, which is another one."""
    named = os.path.relpath(board.trtexec)
    process = call(board, "build", dense, "--trtexec", named)
    (engine,) = json.loads(process.communicate(timeout=60)[0])["engines"]
    assert process.returncode == 0 and engine["command"][0] == os.path.abspath(named)


def test_a_network_against_its_copy_is_two_models(board, dense, tmp_path):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(dense.read_bytes())
    raw = bench(board, dense, copy, dense)
    assert [a["name"] for a in raw["artifacts"]] == [dense.name, "copy.onnx"] and len({a["sha256"] for a in raw["artifacts"]}) == 1
    assert {w["artifact"] for w in raw["windows"] if w["kind"] == "load"} == {0, 1}


def test_an_output_that_is_no_file_is_refused_before_anything_is_measured(board, dense, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path, tmp_path / "pipe", "/dev/full", tmp_path / "nowhere" / "raw.json"):
        assert "-o" in refusal(board, dense, "-o", out)
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    call(board, "bench", dense, *HASTE, "-o", tmp_path / "link.json").communicate(timeout=60)
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text())["schema"] == 1


def test_a_cache_that_cannot_be_written_is_a_sentence(board, dense, tmp_path):
    """A root's cache from a container, a read-only home; here a file stands in the way, which stops root too."""
    (tmp_path / "file").write_text("")
    process = subprocess.Popen(
        [PYTHON, str(AGENT), "bench", *map(str, HASTE), str(dense)],
        env={**os.environ, **board.env, "XDG_CACHE_HOME": str(tmp_path / "file")}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "cannot be written by this user" in process.communicate(timeout=60)[1] and process.returncode == 5


def test_output_file_is_whole_or_not_there(board, dense, tmp_path):
    out = tmp_path / "raw.json"
    process = call(board, "bench", dense, *HASTE, "-o", out)
    process.communicate(timeout=60)
    assert json.loads(out.read_text())["schema"] == 1
    assert not list(tmp_path.glob("*.part"))


def test_no_room_for_the_output(board, dense, tmp_path):
    """On a file system of one page, really full: one sentence, and nothing half-written stays there."""
    full = 'mount -t tmpfs -o size=4k none "$0" && { "$@"; code=$?; ls -A "$0"; exit $code; }'
    small = tmp_path / "small"
    small.mkdir()
    argv = ["unshare", "-rm", "sh", "-c", full, small, PYTHON, AGENT, "bench", dense, *HASTE, "-o", small / "raw.json"]
    process = subprocess.run(list(map(str, argv)), env={**os.environ, **board.env}, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.strip().splitlines()[-1] == "agent.py: [Errno 28] No space left on device"
    assert board.leftovers() == []


def test_protocol_and_unknown_words_are_refused(board):
    for request in ({"protocol": 2}, {"protocol": 1, "warmup": 3}):
        body = json.dumps(request)
        process = call(board, "serve", stdin=subprocess.PIPE)
        out = process.communicate(f"{len(body):012d}{body}", timeout=20)[0]
        events = [json.loads(line.partition(":")[2]) for line in out.splitlines()]
        assert [event["event"] for event in events] == ["hello", "error"]
        assert events[1]["kind"] == "version" and "this agent speaks protocol 1" in events[1]["message"]


def test_every_word_of_a_request_is_in_the_protocol(agent):
    protocol = (AGENT.parent / "PROTOCOL.md").read_text()
    missing = [name for name in agent.DEFAULTS if f"`{name}`" not in protocol]
    assert missing == [] and f"protocol {agent.PROTOCOL}" in protocol.lower()


def test_power_follows_the_waveform(board, dense):
    """Every reading is one the sensor gave: the means of the wave over its refreshes."""
    wave = Waveform(6000, ((800, 0.7, 0.3),), (1500, 1.3, 0.4))
    with board.powered({"VDD_IN": wave}, quantum_mw=4):
        raw = bench(board, dense)
    t, values = raw["power"]["t_ns"], raw["power"]["values"]["VDD_IN"]
    # each reading shows one refresh of 50 ms that ended at most 50 ms (and a scheduling delay) ago
    errors = []
    for stamp, value in zip(t, values, strict=True):
        end = stamp / 1e9
        candidates = [wave.integral(end - lag - 0.05, end - lag) / 0.05 for lag in (i * 0.001 for i in range(70))]
        errors.append(min(abs(value - c) for c in candidates))
    assert sorted(errors)[int(0.95 * len(errors))] < 40
