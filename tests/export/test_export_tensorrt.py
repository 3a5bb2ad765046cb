"""Real compiles by TensorRT for RTX where it is installed; and the adapter's decisions for every TensorRT from 8.2 to 11."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_nets import SPEC, images

from prunectl.console import Console
from prunectl.errors import CorruptFile, DeviceUnavailable, UsageError, VerificationFailed
from prunectl.export import graph, onnx, profiles, quantize, tensorrt, trt_build
from prunectl.export.artifact import read_record
from prunectl.workflows import engine
from prunectl.workflows.engine import default_profile

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'prunectl[rtx]' to compile")


@pytest.fixture(scope="module")
def rtx():
    return profiles.load("rtx")


@pytest.fixture(scope="module")
def compiler():
    return tensorrt.rtx_compiler(("SM86",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, cpu_model, rtx):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(cpu_model, path, spec=SPEC, profile=rtx)
    return path


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_compiles_to_an_engine(precision, tmp_path, cpu_model, rtx, compiler):
    path = tmp_path / "model.onnx"
    onnx.save(onnx.lowered(cpu_model, SPEC, rtx, precision, [images()]), path, spec=SPEC, profile=rtx, precision=precision)
    engine = tensorrt.build(path, compiler, tmp_path / "engines", profile=rtx, precision=precision)
    assert engine.path.stat().st_size == engine.bytes > 1000
    assert (engine.cached, engine.flags, engine.compiler.gpus) == (False, (), ("SM86",))
    assert sorted(p.suffix for p in (tmp_path / "engines").iterdir()) == [".engine", ".json"]


@needs_rtx
def test_pixels_a_free_batch_and_sparsity_compile_for_every_gpu(tmp_path, network, rtx, orin):
    free = onnx.lowered(onnx.build(network, SPEC, orin, batch=None), SPEC.of_pixels(), rtx, "fp16")
    path = tmp_path / "free.onnx"
    onnx.save(free, path, spec=SPEC.of_pixels(), profile=rtx, precision="fp16")
    engine = tensorrt.build(path, tensorrt.rtx_compiler(), tmp_path, profile=rtx, precision="fp16", sparse=True, batch=8)
    assert engine.flags == ("SPARSE_WEIGHTS",)
    assert engine.compiler.gpus == tensorrt.CAPABILITIES


@needs_rtx
def test_an_engine_is_built_once_and_again_if_damaged(tmp_path, saved, rtx, compiler):
    first = tensorrt.build(saved, compiler, tmp_path, profile=rtx)
    again = tensorrt.build(saved, compiler, tmp_path, profile=rtx)
    assert (first.cached, again.cached) == (False, True)
    assert (again.path, again.sha256, again.compiler) == (first.path, first.sha256, first.compiler)
    first.path.write_bytes(b"damaged")
    assert not tensorrt.build(saved, compiler, tmp_path, profile=rtx).cached
    first.path.with_suffix(".engine.json").write_text("{}")
    with pytest.raises(CorruptFile, match="not the record of an engine"):
        tensorrt.build(saved, compiler, tmp_path, profile=rtx)


@needs_rtx
def test_a_file_the_parser_refuses_is_explained_and_leaves_nothing(tmp_path, cpu_model, rtx, compiler):
    """ONNX Runtime's own INT8 settings: INT32 biases, which TensorRT has not."""
    path = tmp_path / "wrong.onnx"
    path.write_bytes(quantize.for_cpu(cpu_model, [images()]).SerializeToString())
    with pytest.raises(VerificationFailed, match=r"building the engine of wrong\.onnx: tensorrt_rtx refuses it: .*Int32"):
        tensorrt.build(path, compiler, tmp_path / "out", profile=rtx, precision="int8")
    assert list((tmp_path / "out").iterdir()) == []
    found = tensorrt.refusals(path, compiler, profile=rtx)
    assert found[0].operator == "DequantizeLinear"
    assert found[0].node
    good = tmp_path / "good.onnx"
    good.write_bytes(cpu_model.SerializeToString())
    assert tensorrt.refusals(good, compiler, profile=rtx) == []


@needs_rtx
def test_a_corrupt_file_is_refused_by_the_parser(tmp_path, rtx, compiler):
    (tmp_path / "bad.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(VerificationFailed, match="refuses it"):
        tensorrt.build(tmp_path / "bad.onnx", compiler, tmp_path, profile=rtx)


def test_without_gpu_or_compiler_the_way_out_is_named(tmp_path, monkeypatch, saved, rtx):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match=r"no usable NVIDIA GPU.*--host.*--profile rtx.*bundle"):
        tensorrt.local_compiler()
    missing = tensorrt.Compiler("no_such_tensorrt", "0", ("SM86",))
    with pytest.raises(DeviceUnavailable, match="no_such_tensorrt is not installed"):
        tensorrt.build(saved, missing, tmp_path, profile=rtx)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "was killed, most likely for lack of memory"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashed in crashing_trt .SIGSEGV"),
        ("import time\ntime.sleep(60)", "took more than 3 s"),
        ("raise RuntimeError('no such driver')", "failed in crashing_trt: RuntimeError: no such driver"),
    ],
)
def test_a_compiler_that_dies_does_not_take_us_along(body, message, tmp_path, monkeypatch, saved, rtx):
    (tmp_path / "crashing_trt.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceUnavailable, match=message):
        tensorrt.build(saved, tensorrt.Compiler("crashing_trt", "0", ()), tmp_path / "out", profile=rtx, timeout_s=3)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compiler_ends_with_whoever_waits_for_it(tmp_path, saved):
    """However that ends: SIGKILL gives it no time to say so."""
    (tmp_path / "sleeping_trt.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    wait = "from prunectl.export.tensorrt import _ask; _ask('sleeping_trt', {}, 'waiting', 60)"
    parent = subprocess.Popen([sys.executable, "-c", wait], env={**os.environ, "PYTHONPATH": str(tmp_path)})

    def soon(what: Callable[[], bool]) -> bool:
        return any(what() or time.sleep(0.05) for _ in range(600))

    assert soon(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    parent.kill()
    parent.wait()
    assert soon(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize(("version", "words"), [("8.5.3", "mis-reads files for TensorRT 10"), ("8.2.1", "mis-reads")])
def test_a_tensorrt_here_that_is_older_than_the_profile_is_refused(version, words, saved):
    """As one on a board is: before 10 it reduces over all axes where a file of opset 18 names some."""
    compiler, record = tensorrt.Compiler("tensorrt", version, ("RTX 3060 (SM86)",)), read_record(saved)
    with pytest.raises(VerificationFailed, match=words):
        engine.build(compiler, saved, record, profiles.load("gpu"), sparse=False, ui=Console(verbosity=-1))


def test_wrong_requests_are_refused_before_anything_is_built(tmp_path, saved):
    compiler = tensorrt.Compiler("tensorrt", "8.2.1", ("TX2",))
    tx2 = profiles.load("tx2")
    with pytest.raises(UsageError, match="no INT8"):
        tensorrt.build(saved, compiler, tmp_path, profile=tx2, precision="int8")
    with pytest.raises(UsageError, match="2:4 with profile tx2"):
        tensorrt.build(saved, compiler, tmp_path, profile=tx2, sparse=True)
    with pytest.raises(UsageError, match="not a file"):
        tensorrt.build(tmp_path / "none.onnx", compiler, tmp_path, profile=tx2)


def test_the_key_names_everything_that_makes_another_engine():
    base = ("a" * 64, tensorrt.Compiler("tensorrt", "10.3", ("RTX 4090 (SM89)",)))
    key = tensorrt.engine_key(*base, precision="fp16", flags=["sparse", "batch=1"])
    assert key == tensorrt.engine_key(*base, precision="fp16", flags=["batch=1", "sparse"])
    others = {
        tensorrt.engine_key("b" * 64, base[1], precision="fp16", flags=["sparse", "batch=1"]),
        tensorrt.engine_key(base[0], tensorrt.Compiler("tensorrt", "10.4", base[1].gpus), precision="fp16", flags=["sparse", "batch=1"]),
        tensorrt.engine_key(base[0], tensorrt.Compiler("tensorrt", "10.3", ("T4 (SM75)",)), precision="fp16", flags=["sparse", "batch=1"]),
        tensorrt.engine_key(
            base[0], tensorrt.Compiler("tensorrt_rtx", "10.3", base[1].gpus), precision="fp16", flags=["sparse", "batch=1"]
        ),
        tensorrt.engine_key(*base, precision="int8", flags=["sparse", "batch=1"]),
        tensorrt.engine_key(*base, precision="fp16", flags=["batch=1"]),
    }
    assert len(others | {key}) == 7


class Config:
    """Records what a builder config is told; `pools` only since TensorRT 8.4."""

    def __init__(self, pools: bool) -> None:
        self.flags, self.profiles, self.limits = [], [], {}
        if pools:
            self.set_memory_pool_limit = self.limits.__setitem__
        self.set_flag, self.add_optimization_profile = self.flags.append, self.profiles.append


def tensorrt_like(version):
    """The part of each version's API that differs: which flags exist. (NVIDIA's Python API reference of 8.2, 8.6, 10.0 and 11.)"""
    flags = {"SPARSE_WEIGHTS": "SPARSE_WEIGHTS"}
    kinds = {}
    if version < (11, 0):
        flags |= {"FP16": "FP16", "INT8": "INT8"}
        kinds["EXPLICIT_BATCH"] = 0
    if version >= (9, 0):
        kinds["STRONGLY_TYPED"] = 1
    return SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(**kinds),
        BuilderFlag=SimpleNamespace(**flags),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
    )


@pytest.mark.parametrize(
    ("version", "precision", "in_graph", "bits", "flags"),
    [
        ((8, 2), "fp16", False, 0b01, ["FP16"]),
        ((8, 6), "int8", True, 0b01, ["INT8", "FP16"]),
        ((8, 6), "fp32", False, 0b01, []),
        ((10, 0), "fp16", False, 0b01, ["FP16"]),
        ((10, 0), "fp16", True, 0b11, []),
        ((10, 0), "int8", True, 0b11, []),
        ((11, 0), "int8", True, 0b10, []),
        ((11, 0), "fp32", False, 0b00, []),
    ],
)
@pytest.mark.parametrize("pools", [True, False])
def test_each_tensorrt_is_asked_in_its_own_words(version, precision, in_graph, bits, flags, pools):
    trt, config = tensorrt_like(version), Config(pools)
    assert trt_build.network_flags(trt, in_graph=in_graph) == bits
    builder = SimpleNamespace(create_optimization_profile=lambda: None)
    network = SimpleNamespace(num_inputs=1, get_input=lambda i: SimpleNamespace(name="input", shape=(1, 3, 8, 8)))
    job = {"precision": precision, "in_graph": in_graph, "sparse": True, "workspace_mb": 64, "capabilities": [], "batch": 1}
    assert trt_build.configure(trt, builder, network, config, job) == [*flags, "SPARSE_WEIGHTS"]
    assert config.flags == [*flags, "SPARSE_WEIGHTS"]
    assert (config.limits.get("WORKSPACE") if pools else config.max_workspace_size) == 64 << 20
    assert config.profiles == []


def test_a_flag_that_tensorrt_11_dropped_is_not_silently_ignored():
    with pytest.raises(trt_build.Refused, match="no FP16 flag and takes precision from the graph alone"):
        trt_build.precision_flags(tensorrt_like((11, 0)), "fp16", in_graph=False)


def test_the_building_process_imports_no_torch():
    assert "torch" not in trt_build.__dict__
    assert importlib.util.find_spec("prunectl.export.trt_build").origin.endswith("trt_build.py")
    assert sys.executable


def test_graphs_for_older_readers_are_taken_by_the_newest_too(tx2_model, orin_model, tmp_path, rtx):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'prunectl[rtx]' to compile")
    for name, model in (("tx2", tx2_model), ("orin", orin_model)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        assert tensorrt.refusals(path, tensorrt.rtx_compiler(("SM86",)), profile=rtx) == []
        assert graph.read(path).graph.name == model.graph.name


@pytest.mark.parametrize(
    ("version", "profile"), [("11.0.1", "gpu"), ("10.0.0.6", "gpu"), ("8.6.1", "orin"), ("8.5.2.2", "orin"), ("8.2.1.8", "tx2")]
)
def test_the_profile_is_the_newest_that_the_tensorrt_here_reads(version, profile):
    assert default_profile(tensorrt.Compiler("tensorrt", version, ("Orin (SM87)",))) == profile


def test_a_tensorrt_older_than_every_profile_is_refused():
    with pytest.raises(DeviceUnavailable, match=r"7\.1\.3 is older than every export profile"):
        default_profile(tensorrt.Compiler("tensorrt", "7.1.3", ("TX2",)))
