"""Devices of this machine: what they measure agrees with a clock held beside them."""

import dataclasses
import gc
import itertools
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

import onnx
import onnxruntime as ort
import pytest
import standin_board
import torch
from small_models import onnx_model, train_model

from prunectl.bench import cuda, latency
from prunectl.bench.board import agent_path, measure
from prunectl.bench.devices import devices, parse
from prunectl.bench.onnxfile import opened
from prunectl.bench.records import Job, OnnxModel, RawBench, Settings
from prunectl.bench.report import report
from prunectl.bench.sampling import GpuEnergyCounter
from prunectl.errors import CorruptFile, DeviceUnavailable, UnknownName, UsageError

SWIFT = Settings.for_host(warmup_s=0.05, duration_s=0.2, iterations=5, repeats=3, idle_s=0.1, threads=1)
quiet = lambda text: None  # noqa: E731


@pytest.fixture
def pair(tmp_path: Path) -> tuple[OnnxModel, OnnxModel]:
    return onnx_model(tmp_path, "dense", 48), onnx_model(tmp_path, "pruned", 24)


def test_the_registry_and_its_index_agree():
    assert devices.names() == ["cpu", "cuda", "jetson", "replay"]
    for name, text in devices.help().items():
        assert devices.get(name).__doc__.strip().split("\n")[0] == text


def test_a_device_and_its_target():
    assert parse("cpu") == ("cpu", None)
    assert parse("cuda:1") == ("cuda", "1")
    assert parse("jetson:nvidia@tx2") == ("jetson", "nvidia@tx2")
    assert parse("replay:runs/a:b/raw.json") == ("replay", "runs/a:b/raw.json")
    with pytest.raises(UnknownName, match="did you mean jetson"):
        parse("jetsn")


# ----------------------------------------------------------------------------------------------------------------- cpu


def test_two_models_in_turns_on_the_cpu(pair):
    before = os.sched_getaffinity(0), torch.get_num_threads()
    raw = devices.get("cpu")(Job(pair), SWIFT, say=quiet)
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    loads = [w for w in raw.windows if w.kind == "load"]
    assert [w.artifact for w in loads] == [0, 1] * 3
    assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(loads))
    assert raw.environment["threads"] == len(raw.environment["cores"]) == 1
    for window in loads:
        assert len(window.latency_ns) >= 5 and sum(window.latency_ns) == window.end_ns - window.start_ns
    result = report(raw)
    ratio = result.ratios[0]
    assert (ratio.metric, ratio.numerator, ratio.denominator) == ("latency_ms", "pruned", "dense")
    times = [[statistics.median(w.latency_ns) for w in loads if w.artifact == i] for i in (0, 1)]
    assert ratio.median == pytest.approx(statistics.median(b / a for a, b in zip(*times, strict=True)))  # true or not: the slow test below
    if raw.power.source is None:
        assert result.reports[0].energy.mj_per_inference is None
        assert "no power sensor answers" in result.reports[0].energy.reason


def test_the_garbage_collector_keeps_away_and_comes_back():
    gc.unfreeze()  # the suite freezes what it imported
    try:
        with latency.quiet_heap():
            assert gc.get_freeze_count() > 10_000  # torch alone is more
            with latency.quiet_heap():
                pass
            assert gc.get_freeze_count() > 10_000  # its own, not the inner one's
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_every_core_this_process_may_use(pair):
    raw = devices.get("cpu")(Job(pair[:1]), dataclasses.replace(SWIFT, repeats=1, threads=None), say=quiet)
    assert set(raw.environment["cores"]) == os.sched_getaffinity(0)
    with pytest.raises(UsageError, match="may use"):
        devices.get("cpu")(Job(pair[:1]), Settings(threads=4096), say=quiet)


def test_other_programs_on_the_core_are_seen(pair, tmp_path):
    """Two busy loops on the same core: the bench says that its times are those of a competition."""
    core = min(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.3)
        raw = devices.get("cpu")(Job(pair[:1]), dataclasses.replace(SWIFT, repeats=2), say=quiet)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert any("dense: other programs had its core for up to" in warning for warning in report(raw).warnings)


def independent_p50_ms(model: OnnxModel, seconds: float) -> float:
    """A timing loop of our own, in its own process, as a sceptic would write it."""
    code = (
        "import sys, time, numpy, onnxruntime as ort\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = 1\n"
        "s = ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider'])\n"
        "x = {i.name: numpy.random.randn(*i.shape).astype('f4') for i in s.get_inputs()}\n"
        "for _ in range(20): s.run(None, x)\n"
        "times, end = [], time.perf_counter() + float(sys.argv[2])\n"
        "while time.perf_counter() < end:\n"
        "    t = time.perf_counter(); s.run(None, x); times.append(time.perf_counter() - t)\n"
        "print(numpy.median(times) * 1e3)\n"
    )
    said = subprocess.run([sys.executable, "-c", code, str(model.path), str(seconds)], capture_output=True, text=True, check=True)
    return float(said.stdout)


@pytest.mark.slow
def test_speed_up_agrees_within_5_percent(tmp_path):
    if os.getloadavg()[0] > 0.5 * len(os.sched_getaffinity(0)):
        pytest.skip("other programs run on this machine: 5 % cannot be checked beside them")
    models = onnx_model(tmp_path, "dense", 64), onnx_model(tmp_path, "pruned", 32)
    settings = Settings.for_host(warmup_s=0.5, duration_s=3.0, repeats=7, threads=1)  # more threads wait for the machine's other programs
    ours = report(devices.get("cpu")(Job(models), settings, say=quiet)).ratios[0].median
    theirs = statistics.median(independent_p50_ms(models[1], 3.0) / independent_p50_ms(models[0], 3.0) for _ in range(7))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_an_open_batch_takes_the_one_asked_for(tmp_path):
    raw = devices.get("cpu")(Job((OnnxModel(onnx_model(tmp_path, "open", 8, batch="N").path, "open", batch=4),)), SWIFT, say=quiet)
    assert raw.artifacts[0].batch == 4


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(UsageError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        devices.get("cpu")(Job((OnnxModel(tmp_path / "broken.onnx", "broken"),)), SWIFT, say=quiet)


def test_training_steps_on_the_cpu():
    tasks = train_model("dense", 32, steps=6), train_model("ticket", 8, steps=6)
    weights = tasks[0].module[0].weight.clone()
    raw = devices.get("cpu")(Job(train=tasks), SWIFT, say=quiet)
    assert torch.equal(tasks[0].module[0].weight, weights)  # a copy was trained
    assert not tasks[0].module.training
    result = report(raw)
    assert result.reports[0].train.steps == 18 and result.reports[0].latency_ms is None
    ratio = result.ratios[0]
    assert (ratio.metric, ratio.numerator, ratio.denominator) == ("ms_per_step", "ticket", "dense")
    times = [[statistics.median(w.latency_ns) for w in raw.windows if (w.kind, w.artifact) == ("train", i)] for i in (0, 1)]
    assert all(len(t) == 3 and min(t) > 0 for t in times)  # which is faster, a busy machine does not say reliably
    assert ratio.median == pytest.approx(statistics.median(b / a for a, b in zip(*times, strict=True)))
    if raw.power.source is None:
        assert result.reports[0].train.mj_per_step is None and "no power sensor" in result.reports[0].train.reason


def test_power_of_the_host_is_read_like_a_rail(pair, board, monkeypatch):
    """The sampler of --device cpu, on a machine that has RAPL: a tree of it, its counter standing still."""
    shutil.rmtree(board.root / "sys/bus")
    folder = board.root / "sys/class/powercap/intel-rapl:0"
    for name, text in (("name", "package-0"), ("energy_uj", 5_000_000), ("max_energy_range_uj", 2**32)):
        standin_board.write(folder / name, text)
    said = subprocess.run(
        [sys.executable, str(agent_path()), "sample", "--root", str(board.root)], input="", capture_output=True, text=True
    )
    about, seen = map(json.loads, said.stdout.splitlines())
    assert about["source"] == "rapl" and about["rails"][0]["unit"] == "uJ"
    assert set(seen["values"]) == {"package-0"}


def test_a_sampler_that_was_killed_takes_no_latency_along(pair):
    def kill_it(text):
        if "repeat 2" in text:
            children = Path("/proc/thread-self/children").read_text().split()  # the test runner may have others
            (sampler,) = (pid for pid in children if b"agent.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(int(sampler), signal.SIGKILL)

    raw = devices.get("cpu")(Job(pair[:1]), SWIFT, say=kill_it)
    assert raw.power.source is None and raw.power.reason == "the sampler process died"
    found = report(raw).reports[0]
    assert found.n > 0 and found.energy.mj_per_inference is None and "sampler" in found.energy.reason


# ---------------------------------------------------------------------------------------------------- cuda and replay


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_sentence(pair):
    with pytest.raises(DeviceUnavailable, match="torch sees no CUDA GPU"):
        devices.get("cuda")(Job(pair), Settings(), say=quiet)
    with pytest.raises(UsageError, match="number of a GPU"):
        devices.get("cuda")(Job(pair), Settings(), target="first", say=quiet)
    counter = GpuEnergyCounter(0)
    counter.mark()
    assert counter.power().source is None and counter.power().reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_two_models_on_the_gpu(pair):
    raw = devices.get("cuda")(Job(pair, (train_model("dense", 16),)), SWIFT, say=quiet)
    assert {w.kind for w in raw.windows} >= {"load", "train"} and raw.environment["gpu"]


def test_replay_says_what_the_bench_said(pair, tmp_path):
    raw = devices.get("cpu")(Job(pair[:1]), SWIFT, say=quiet)
    path = raw.write(tmp_path / "raw.json")
    again = devices.get("replay")(Job(), Settings(), target=str(path), say=quiet)
    assert again.to_dict() == raw.to_dict()
    assert report(again) == report(raw)
    with pytest.raises(UsageError, match="needs a file"):
        devices.get("replay")(Job(), Settings(), say=quiet)
    with pytest.raises(UsageError, match="No such file"):
        RawBench.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("windows"), "KeyError"),
        (lambda r: r.update(schema=9), "is of schema 9"),
        (lambda r: r["power"].update(t_ns=[1, 2]) or r["power"].update(values={"VDD_IN": [1]}), "1 readings of VDD_IN for 2 stamps"),
        (lambda r: r["windows"][0].update(artifact=7), "a window of artifact 7, and 1 artifacts"),
        (lambda r: r.update(power=3), "is no raw bench record"),
        (lambda r: r["windows"][0].update(artifact=0.5), r"windows\.0\.artifact: Input should be a valid integer"),
        (lambda r: r["windows"][0].update(latency_ns=["soon"]), r"windows\.0\.latency_ns\.0: Input should be a valid integer"),
        (lambda r: r["windows"][0].update(latency_ns=[]), "a load window of nothing"),
        (lambda r: r["windows"][0].update(end_ns=-1), "a load window from"),
        (lambda r: r["artifacts"][0].update(batch=0), "of batch 0"),
        (lambda r: r["power"].update(t_ns=[1], values={"VDD_IN": ["much"]}), r"power\.values\.VDD_IN\.0: Input should be a valid number"),
        (lambda r: r["power"].update(t_ns=[None], values={"VDD_IN": [1]}), r"power\.t_ns\.0: Input should be a valid integer"),
        (lambda r: r.update(training=dict(TOTAL)), "a training of dense and another"),
    ],
)
def test_a_damaged_record_is_named(pair, tmp_path, change, words):
    raw = json.loads(json.dumps(RAW.to_dict()))
    change(raw)
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    with pytest.raises(CorruptFile, match=words):
        RawBench.read(tmp_path / "raw.json")


TOTAL = {"run": "r", "dense": "dense", "ticket": "another", "dense_steps": 9.0, "search_steps": 1.0, "ticket_steps": 5.0}
RAW = RawBench.from_dict(
    {
        "schema": 1, "device": "cpu", "simulated": False, "settings": {}, "environment": {},
        "artifacts": [{"name": "a", "kind": "onnx", "sha256": None, "batch": 1, "precision": "fp32"}],
        "windows": [{"kind": "load", "artifact": 0, "repeat": 0, "start_ns": 0, "end_ns": 3, "latency_ns": [1, 2]}],
        "power": {"source": None, "reason": "none", "rails": [], "t_ns": [], "values": {}}, "telemetry": {"t_ns": [], "values": {}},
    }
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the board, for real


def test_real_inference_on_the_board(board, pair, monkeypatch):
    """The stand-in runs ONNX Runtime: the agent's latencies are those of the models."""
    board.set_trtexec(version=8601, mode="onnxruntime")
    for name, value in board.env.items():
        monkeypatch.setenv(name, value)
    settings = Settings(warmup_s=0.1, duration_s=0.3, iterations=5, repeats=1, idle_s=0.1, refresh_probe_s=0.1)
    raw = measure(Job(pair), settings, host=None, say=quiet)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    dense, pruned = (float(r.latency_ms["p50"]) for r in report(raw).reports)
    assert pruned < 0.7 * dense
    session = ort.InferenceSession(str(pair[0].path), options, providers=["CPUExecutionProvider"])
    feed = {node.name: torch.randn(node.shape).numpy() for node in session.get_inputs()}
    times = []
    for _ in range(60):
        begin = time.monotonic()
        session.run(None, feed)
        times.append((time.monotonic() - begin) * 1e3)
    assert 0.25 < dense / statistics.median(times) < 4  # the unit and the file; other programs use this machine too


def test_a_model_in_two_files(pair, tmp_path):
    """Measured here, known by both files, refused for a board, and told when one is missing."""
    file, weights = tmp_path / "split.onnx", tmp_path / "weights.bin"
    onnx.save_model(onnx.load(str(pair[0].path)), str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = opened(file, "split", None)
    digest = model.sha256
    assert model.weights == (weights,) and devices.get("cpu")(Job((model,)), SWIFT, say=quiet).artifacts[0].sha256 == digest
    with pytest.raises(UsageError, match=r"weights.bin.*export it as one file"):
        measure(Job((model,)), Settings(), host=None, say=quiet)
    weights.write_bytes(bytes(weights.stat().st_size))
    assert model.sha256 != digest
    weights.unlink()
    with pytest.raises(UsageError, match=r"weights.bin, which is not beside it"):
        opened(file, "split", None)


@pytest.mark.parametrize(
    ("graph", "asked", "computes", "typed"),
    [("fp32", "fp32", "fp32", False), ("fp32", "fp16", "fp16", False), ("fp16", "fp16", "fp16", True), ("fp16", "fp32", "fp16", True)],
)
def test_what_a_gpu_is_asked_to_compute_in(tmp_path, graph, asked, computes, typed):
    """The types of the graph, where it has any but fp32: those that the report names, and TensorRT is held to them."""
    kind = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[graph]
    ends = [onnx.helper.make_tensor_value_info(name, kind, (1, 3, 2, 2)) for name in "xy"]
    one = onnx.helper.make_tensor("one", kind, (1,), [1.0])
    times_one = onnx.helper.make_graph([onnx.helper.make_node("Mul", ["x", "one"], ["y"])], "g", ends[:1], ends[1:], [one])
    onnx.save(onnx.helper.make_model(times_one), tmp_path / "m.onnx")
    job = cuda.build_job(opened(tmp_path / "m.onnx", "m", None), Settings(precision=asked))
    assert (job["precision"], job["in_graph"]) == (computes, typed)


@pytest.mark.parametrize(("kind", "fed"), [("DOUBLE", True), ("INT64", True), ("BOOL", False)])
def test_inputs_of_other_types(tmp_path, kind, fed):
    ends = [onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), (1, 3, 2, 2)) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    job = Job((opened(tmp_path / "m.onnx", "m", None),))
    if fed:
        assert devices.get("cpu")(job, SWIFT, say=quiet).artifacts[0].precision == "fp32"
    else:
        with pytest.raises(UsageError, match=r"input x takes tensor\(bool\): expected images"):
            devices.get("cpu")(job, SWIFT, say=quiet)


@pytest.mark.skipif(
    "PRUNECTL_TORCH110_PYTHON" not in os.environ, reason="optional: $PRUNECTL_TORCH110_PYTHON names a Python 3.6 with torch 1.10.0"
)
def test_what_this_torch_traced_trains_in_torch_110(board, monkeypatch):
    """The board's own torch and Python: https://download.pytorch.org/whl/torch, or PyPI's torch==1.10.0 for Python 3.6."""
    for name, value in board.env.items():
        monkeypatch.setenv(name, value)
    python = os.environ["PRUNECTL_TORCH110_PYTHON"]
    settings = Settings(repeats=3, idle_s=0.2, refresh_probe_s=0.1, python=(python,), train_python=python)
    tasks = train_model("dense", 64, steps=20), train_model("ticket", 32, steps=20)
    raw = measure(Job(train=tasks), settings, host=None, say=quiet)
    dense, ticket = (r.train for r in report(raw).reports)
    trainer = raw.windows[-1].details["trainer"]
    print(f"torch {trainer['torch']}: {dense.ms_per_step:.2f} ms a step dense, {ticket.ms_per_step:.2f} half as wide")
    assert raw.train_reason is None and trainer["torch"].startswith("1.10") and raw.environment["python"].startswith("3.6")
    assert trainer["loss"] > 0 and ticket.ms_per_step < dense.ms_per_step


def test_training_without_torch_keeps_the_rest(board, pair, monkeypatch):
    board.set_trtexec(version=8601)
    for name, value in board.env.items():
        monkeypatch.setenv(name, value)
    settings = Settings(
        warmup_s=0, duration_s=0.2, iterations=5, repeats=1, idle_s=0.1, refresh_probe_s=0.1, python=(standin_board.board_python(),)
    )
    raw = measure(Job(pair[:1], (train_model("dense", 8),)), settings, host=None, say=quiet)
    result = report(raw)
    assert result.reports[0].latency_ms["p50"] > 0
    if "No module named 'torch'" in (raw.train_reason or ""):
        assert result.reports[0].train.ms_per_step is None and "the container has it" in result.reports[0].train.reason
        assert any("training:" in w for w in result.warnings)


def test_every_thread_is_bound_and_given_back():
    """Those that torch had before, too, and those that it starts inside."""

    def masks() -> set[frozenset[int]]:
        return {frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}

    allowed, stop = frozenset(os.sched_getaffinity(0)), threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(2)]
    threads[0].start()
    try:
        with latency.pinned(1) as cores:
            threads[1].start()
            assert masks() == {frozenset(cores)} and len(cores) == 1
        assert masks() == {allowed}
    finally:
        stop.set()
