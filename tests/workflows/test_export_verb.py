"""export through the real command line: what it writes is loaded and run, what it refuses leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from running import installed, only_run, prunectl

from prunectl import data, load, load_onnx_session
from prunectl.export import tensorrt
from prunectl.export.artifact import read_record
from prunectl.export.profiles import load as load_profile
from prunectl.workflows import engine
from prunectl.workflows.export_source import Source

SMALL = ("--set", "model.width=0.5", "--set", "data.train_images=400", "--set", "train.batch_size=50", "--precision", "fp32")
ONE_IMAGE = 0.05 + 1e-9  # percent: of 2,000 test images one may fall to the other side when sums are taken in another order
KEYS = {
    "path",
    "kind",
    "profile",
    "precision",
    "sha256",
    "bytes",
    "opset",
    "ir",
    "batch",
    "params",
    "macs",
    "max_abs_diff",
    "top1_agreement",
    "accuracy",
}
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'prunectl[rtx]' to compile")


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    """A finished find-ticket run, trained for a moment, as runs/<name> with runs/latest beside it."""
    out = tmp_path_factory.mktemp("home") / "runs"
    done = prunectl("find-ticket", "resnet8", "fashion-mini", *SMALL, "--epochs", "3", "--detector", "epoch:1", "--out", out)
    assert done.code == 0, done.err
    return only_run(out)


@pytest.fixture(scope="module")
def nm(tmp_path_factory):
    out = tmp_path_factory.mktemp("nm")
    done = prunectl(
        *("sfw-prune", "resnet8", "fashion-mini", *SMALL, "--constraint", "nm", "--epochs", "2", "--bn-recal", "2"), "--out", out
    )
    assert done.code == 0, done.err
    return only_run(out)


@pytest.fixture(scope="module")
def pixels():
    """64 test images as uint8 (64, 1, H, W), the way a camera gives them."""
    info = data.load("fashion-mini").info
    x, _ = data.load("fashion-mini").sample(64, seed=3, split="test")
    return np.rint((x.numpy() * info.std[0] + info.mean[0]) * 255).astype(np.uint8)


@pytest.fixture
def a_copy(tmp_path, ticket):
    return Path(shutil.copytree(ticket, tmp_path / "copy"))


def exported(run, out, *options):
    """The document of an export that went well, and its first file."""
    done = prunectl("export", run, "--out", out, "--json", *options)
    assert done.code == 0, done.err
    return done.document, Path(done.document["artifacts"][0]["path"])


def close(a, b):
    """Equal logits but for the order of float32 sums."""
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


# -- what is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "opset"), [("cpu", 18), ("gpu", 18), ("orin", 17), ("tx2", 13)])
def test_every_profile_without_a_gpu_writes_a_file_that_is_the_network(profile, opset, ticket, tmp_path):
    document, path = exported(ticket, tmp_path, "--profile", profile)
    entry, result = document["artifacts"][0], json.loads((ticket / "result.json").read_text())
    assert entry.keys() >= KEYS and (entry["kind"], entry["profile"], entry["opset"]) == ("onnx", profile, opset)
    assert (document["verb"], document["outcome"], document["run"]) == ("export", "exported", str(ticket.resolve()))
    assert (document["model"], document["dataset"], document["seed"]) == ("resnet8", "fashion-mini", 0) and document["wall_s"] > 0
    assert entry["macs"] == result["macs"]["ticket"] and entry["top1_agreement"] == 100
    assert entry["accuracy"] == pytest.approx(result["accuracy"]["final"], abs=ONE_IMAGE)
    assert [f for f in document["lint"] if f["severity"] == "error"] == []
    assert read_record(path).accuracy == entry["accuracy"]
    session, images = load_onnx_session(path), data.load("fashion-mini")
    x, _ = images.sample(4, seed=0, split="test")
    with torch.no_grad():
        close(session.run_normalised(x.numpy()), load(ticket)(x).numpy())
    assert session.spec.classes == images.info.classes
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".onnx"]


@needs_rtx
def test_rtx_compiles_an_engine_without_a_gpu_once(ticket, tmp_path):
    first, _ = exported(ticket, tmp_path, "--profile", "rtx")
    file, engine = first["artifacts"]
    assert (engine["kind"], engine["cached"]) == ("engine", False) and "tensorrt_rtx" in engine["compiler"] and "SM86" in engine["gpus"]
    assert Path(engine["path"]).stat().st_size == engine["bytes"] > 10_000
    assert engine["accuracy"] is None and engine["top1_agreement"] is None and "GPU" in engine["reason"] and file["accuracy"] is not None
    again = exported(ticket, tmp_path, "--profile", "rtx", "--trt")[0]["artifacts"][1]
    assert again["cached"] and again["sha256"] == engine["sha256"]


def test_rtx_without_its_compiler_names_the_way_out(ticket, tmp_path, monkeypatch):
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('no such compiler')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = prunectl("export", ticket, "--profile", "rtx", "--out", tmp_path / "out")
    done.refused(5, "pip install 'prunectl[rtx]'", "--profile gpu", "no such compiler")
    assert not (tmp_path / "out").exists()


def test_without_a_path_the_latest_run_is_taken_and_shown(ticket, monkeypatch):
    monkeypatch.chdir(ticket.parents[1])
    done = prunectl("export", "--profile", "orin")
    assert done.code == 0, done.err
    for words in ("writing compact-orin-fp32.onnx", "answers as torch does on 256 real", "of 2000 test images", "compact-orin-fp32.onnx"):
        assert words in done.out
    assert (ticket / "export" / "compact-orin-fp32.onnx").is_file()
    shown = prunectl("show", "--json").document
    assert [Path(e["path"]).name for e in shown["exports"]] == ["compact-orin-fp32.onnx"]
    assert "compact-orin-fp32.onnx" in prunectl("show").out


def test_an_untrained_network_can_be_exported(tmp_path):
    out = tmp_path / "runs"
    assert prunectl("train", "resnet8", "fashion-mini", *SMALL, "--epochs", "0", "--out", out).code == 0
    document, _ = exported(only_run(out), tmp_path / "out", "--profile", "orin")
    assert document["artifacts"][0]["accuracy"] < 40


def test_widths_that_a_target_pads_are_said(tmp_path):
    out = tmp_path / "runs"
    odd = ("--epochs", "2", "--detector", "epoch:1", "--sparsity", "0.4", "--round-to", "1", "--search-only")
    assert prunectl("find-ticket", "resnet8", "fashion-mini", *SMALL, *odd, "--out", out).code == 0
    done = prunectl("export", only_run(out), "--profile", "orin")
    assert done.code == 0 and "have widths that are no multiple of 8" in done.out


def test_pixels_go_in_where_normalisation_is_inside(ticket, tmp_path, pixels):
    _, plain = exported(ticket, tmp_path, "--profile", "orin")
    document, path = exported(ticket, tmp_path, "--profile", "orin", "--uint8-input")
    assert path.name == "compact-uint8-orin-fp32.onnx"
    inside, outside = load_onnx_session(path), load_onnx_session(plain)
    assert inside.session.get_inputs()[0].type == "tensor(uint8)" and inside.spec.dtype == "uint8"
    close(inside.run(pixels), outside.run(pixels))
    assert document["artifacts"][0]["accuracy"] == pytest.approx(read_record(plain).accuracy, abs=ONE_IMAGE)


@pytest.mark.parametrize(("options", "shape", "name"), [(("--batch", 3), 3, "b3"), (("--dynamic-batch",), None, "dynamic")])
def test_batches(options, shape, name, ticket, tmp_path):
    document, path = exported(ticket, tmp_path, "--profile", "orin", *options)
    first = load_onnx_session(path).session.get_inputs()[0].shape[0]
    assert first == shape if shape else isinstance(first, str)
    assert f"-{name}-" in path.name and read_record(path).batch == shape
    assert document["artifacts"][0]["macs"] == json.loads((ticket / "result.json").read_text())["macs"]["ticket"]  # for one image


def test_half_precision_is_in_the_graph_or_in_a_flag(ticket, tmp_path):
    _, full = exported(ticket, tmp_path, "--profile", "cpu")
    half, path = exported(ticket, tmp_path, "--profile", "cpu", "--precision", "fp16")
    assert path.stat().st_size < 0.7 * full.stat().st_size
    assert half["artifacts"][0]["accuracy"] == pytest.approx(read_record(full).accuracy, abs=0.5)  # ten images of 2,000 at the margin
    tx2, flagged = exported(ticket, tmp_path, "--profile", "tx2", "--precision", "fp16")
    (entry,) = tx2["artifacts"]
    assert (entry["precision"], entry["graph_precision"]) == ("fp16", "fp32") and half["artifacts"][0]["graph_precision"] == "fp16"
    assert entry["estimated_accuracy"] == pytest.approx(half["artifacts"][0]["accuracy"], abs=ONE_IMAGE)  # the same FP16 graph
    assert "fp32; fp16 in the engine" in prunectl("export", ticket, "--out", tmp_path, "--profile", "tx2", "--precision", "fp16").out
    assert read_record(flagged).engine_flags == ("fp16",) and load_onnx_session(flagged).session.get_inputs()[0].type == "tensor(float)"


LOUD = """
from torch import nn
class Loud(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 8, 3, stride=4), nn.Linear(8, classes)
    def forward(self, x):
        x = 30000.0 * (self.first(x).relu() + 5)
        return self.last(x.mean((2, 3)) / 30000.0)
def net(num_classes, in_channels):
    return Loud(in_channels, num_classes)
"""


def test_values_that_fp16_cannot_hold_are_found_although_onnx_runtime_does_not_stumble(tmp_path):
    """On a CPU it works FP16 graphs out in FP32."""
    (tmp_path / "nets.py").write_text(LOUD)
    train = ("train", f"{tmp_path}/nets.py:net", "fashion-mini", *SMALL[2:], "--epochs", "1", "--out", tmp_path / "runs", "--json")
    run = prunectl(*train).document["run"]
    assert prunectl("export", run, "--out", tmp_path / "out").code == 0
    refused = prunectl("export", run, "--out", tmp_path / "half", "--precision", "fp16", "-q")
    refused.refused(4, "FP16 ends at 65,504", "export in fp32")
    assert not (tmp_path / "half").exists() or not list((tmp_path / "half").iterdir())
    warned = prunectl("export", run, "--out", tmp_path / "tx2", "--profile", "tx2", "--precision", "fp16", "--json").document["warnings"]
    assert any("FP16 ends at 65,504" in w and "build it in fp32" in w for w in warned)


def _pictures(root: Path, classes: tuple[str, ...], each: int) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", each), ("val", 6)):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(20 * k, 60 + 60 * k + 10 * (i % 3), (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_a_run_on_a_folder_is_exported_from_anywhere_with_its_own_normalisation(tmp_path, monkeypatch):
    """The folder's mean and deviation were measured on the part that was trained on; another part has others."""
    _pictures(tmp_path / "data" / "flowers", ("rose", "tulip"), 40)
    _pictures(tmp_path / "other" / "flowers", ("cat", "dog", "eel"), 10)
    monkeypatch.chdir(tmp_path / "data")
    sets = ("--set", "model.width=0.25", "--set", "data.train_images=20", "--set", "train.batch_size=10", "--precision", "fp32")
    run = prunectl("train", "resnet8", "flowers", *sets, "--epochs", "2", "--out", tmp_path / "runs", "--json").document["run"]
    monkeypatch.chdir(tmp_path)
    done = prunectl("export", run, "--json")
    assert done.code == 0, done.err
    (entry,) = done.document["artifacts"]
    ran = json.loads((Path(run) / "result.json").read_text())["accuracy"]
    assert entry["accuracy"] == pytest.approx(ran["top1"]) and done.document["warnings"] == []
    plan = json.loads((Path(run) / "model" / "plan.json").read_text())["data"]
    images = Source.at(Path(run), None).dataset()
    assert (images.info.n_train, images.info.mean, images.info.std) == (20, tuple(plan["mean"]), tuple(plan["std"]))
    whole = data.load(str(tmp_path / "data" / "flowers")).info
    assert whole.mean != images.info.mean, "the part must differ from the whole for this to show anything"
    prunectl("export", run, "--data-dir", tmp_path / "other", "--out", tmp_path / "x").refused(2, "3 classes (cat", "2 (rose")
    shutil.move(tmp_path / "data", tmp_path / "gone")
    lost = prunectl("export", run, "--out", tmp_path / "y", "--json")
    assert lost.code == 0 and any("not measured" in w and "--data-dir" in w for w in lost.document["warnings"])
    assert "on 8 random images" in lost.err
    for place in ("gone", "gone/flowers"):  # what holds the set, and the set itself
        again = prunectl("export", run, "--data-dir", tmp_path / place, "--out", tmp_path / place / "z", "--json").document
        assert again["artifacts"][0]["accuracy"] == entry["accuracy"]


@pytest.mark.parametrize("profile", ["cpu", "orin"])
def test_int8_is_calibrated_and_measured(profile, ticket, tmp_path):
    document, path = exported(ticket, tmp_path, "--profile", profile, "--precision", "int8")
    operators = {n.op_type for n in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    lost = json.loads((ticket / "result.json").read_text())["accuracy"]["final"] - document["artifacts"][0]["accuracy"]
    assert lost <= 1 or any("signal-to-noise" in w for w in document["warnings"])


def test_layers_are_named_where_int8_broke_a_file_that_takes_pixels(ticket, tmp_path, monkeypatch):
    """Images clipped at a small part of their range, until much of what the network looks at is gone. How small that is hangs on what
    the network has learnt, which differs between processors; at too little it is refused as another network."""
    right = onnxruntime.quantization.quantize_static
    part = 1

    def clipped(model, path, *args, **options):
        right(model, path, *args, **options)
        made = onnx.load(path)
        first = next(n for n in made.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
        scale = next(t for t in made.graph.initializer if t.name == first.input[1])
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / part, scale.name))
        onnx.save(made, path)

    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", clipped)
    warned = {}
    for part in (32, 16, 64, 8):
        to = ("--out", tmp_path / str(part))
        done = prunectl("export", ticket, *to, "--profile", "orin", "--precision", "int8", "--uint8-input", "--json")
        warned[part] = done.document["warnings"] if done.code == 0 else done.err
        if any("where FP32 has" in w and "/conv1/Conv (" in w for w in warned[part]):
            return
    raise AssertionError(warned)


# -- zeros ---------------------------------------------------------------------------------------------------------------


def kernels(path):
    """Every stored weight of a convolution or product: (outputs, inputs, positions)."""
    graph = onnx.load(path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    used = [stored[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")]
    return [w.reshape(*w.shape[:2], -1) for w in used]


def test_a_share_of_zeros_is_exact_and_its_worth_is_said(nm, tmp_path):
    document, path = exported(nm, tmp_path, "--profile", "orin", "--sparsity", "0.9")
    found = kernels(path)
    assert sum(map(np.count_nonzero, found)) == pytest.approx(0.1 * sum(w.size for w in found), abs=1)
    assert "in no pattern" in document["zeros"] and "every dense engine runs it at full price" in document["zeros"]
    assert document["zeros"] in prunectl("export", nm, "--out", tmp_path, "--profile", "orin", "--sparsity", "0.9").out


@pytest.mark.parametrize(("share", "word"), [("0.0000001", "remove none"), ("0.9999999", "leave none")])
def test_a_share_of_no_weight_or_of_all_is_refused(ticket, tmp_path, share, word):
    prunectl("export", ticket, "--out", tmp_path, "--profile", "orin", "--sparsity", share).refused(3, "--sparsity", word)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_nothing_but_zeros_are_no_mismatch(ticket, tmp_path):
    """An exporter stores equal ones once; ranked together, whole layers go."""
    _, path = exported(ticket, tmp_path, "--profile", "orin", "--sparsity", "0.999")
    assert sum(not w.any() for w in kernels(path)) > 1
    assert "-s0.999-" in path.name


@pytest.mark.parametrize("run", ["nm", "ticket"])
def test_two_of_four_holds_along_the_input_channels(run, request, tmp_path):
    document, path = exported(request.getfixturevalue(run), tmp_path, "--profile", "orin", "--sparsity", "2:4")
    fitting = [w for w in kernels(path) if w.shape[1] % 4 == 0]
    assert len(fitting) == 9  # all but the first of ten layers, which has one input channel
    for w in fitting:
        assert (np.count_nonzero(w.reshape(w.shape[0], -1, 4, w.shape[2]), axis=2) <= 2).all()
    assert "9 of 10 layers in the pattern 2:4" in document["zeros"]
    if run == "nm":
        seen = json.loads((request.getfixturevalue(run) / "result.json").read_text())["pattern"]["accuracy_bn_recalibrated"]
        assert document["artifacts"][0]["accuracy"] == pytest.approx(seen, abs=ONE_IMAGE)


# -- engines that cannot be built here -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="here an engine can be built")
def test_without_gpu_or_host_there_is_a_bundle_that_works_up_to_trtexec(ticket, tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNECTL_JETSON", raising=False)
    done = prunectl("export", ticket, "--trt", "--out", tmp_path / "out", "--precision", "fp16")
    assert done.code == 5 and done.err == ""
    (said,) = [line for line in done.out.splitlines() if line.startswith("no engine: ")]
    assert "no usable NVIDIA GPU" in said and "wrote the bundle" in said and "python3 agent.py bench model.onnx" in said
    (folder,) = (tmp_path / "out").glob("*.bundle")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=False).returncode == 0
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(list(folder.iterdir())) - 1
    command = said.rpartition("run there: ")[2].split()
    ran = subprocess.run([sys.executable, *command[1:], "--root", tmp_path], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 5 and "no trtexec at" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    document = prunectl("export", ticket, "--trt", "--out", tmp_path / "out", "--precision", "fp16", "--json").document
    assert (document["outcome"], [a["kind"] for a in document["artifacts"]]) == ("bundled", ["onnx", "bundle"])
    assert document["profile"] == "tx2" and document["note"].startswith("no engine: ")


# -- an exporter that does not do what it was asked ----------------------------------------------------------------------


def nudged(model):
    """One weight off by a tenth of its layer's standard deviation."""
    kernel = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(kernel).copy()
    values.flat[np.abs(values).argmax()] += 0.1 * values.std()
    kernel.CopyFrom(numpy_helper.from_array(values, kernel.name))


def turned(model):
    """Height and width of one kernel swapped."""
    kernel = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3)
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel).swapaxes(2, 3).copy(), kernel.name))


def newer(model):
    model.opset_import[0].version = 18


@pytest.mark.parametrize(
    ("fault", "words"),
    [(nudged, "not the network"), (turned, "not the network"), (newer, "asked for opset 13 and torch's torchscript exporter wrote 18")],
)
def test_a_wrong_export_is_caught_and_leaves_no_file(fault, words, ticket, tmp_path, monkeypatch):
    right = torch.onnx.export

    def wrong(module, args, file, **options):
        right(module, args, file, **options)
        model = onnx.load_from_string(file.getvalue())
        fault(model)
        file.seek(0)
        file.truncate()
        file.write(model.SerializeToString())

    monkeypatch.setattr(torch.onnx, "export", wrong)
    prunectl("export", ticket, "--profile", "tx2", "--out", tmp_path / "out", "-q").refused(4, words)
    assert not (tmp_path / "out").exists()


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--profile", "tx1"), ("unknown profile 'tx1'", "did you mean tx2")),
        (("--precision", "int8", "--profile", "tx2"), ("no INT8", "use fp32 or fp16")),
        (("--precision", "bf16"), ("precision bf16", "use fp32")),
        (("--sparsity", "2:4"), ("profile cpu", "gpu or orin or rtx")),
        (("--sparsity", "4:2", "--profile", "orin"), ("expected N:M",)),
        (("--sparsity", "1.5"), ("a share between 0 and 1",)),
        (("--sparsity", "half"), ("a share between 0 and 1",)),
        (("--dynamic-batch", "--profile", "tx2"), ("static shapes only",)),
        (("--dynamic-batch", "--batch", "2"), ("give one of them",)),
        (("--batch", "0"), ("batch 0", "at least 1")),
        (("--uint8-input", "--profile", "tx2"), ("no UINT8",)),
        (("--host", "-oProxyCommand=x"), ("not of the form USER@HOST",)),
        (("--trt", "--profile", "cpu"), ("runs the ONNX file itself",)),
        (("--host", "nvidia@tx2", "--profile", "rtx"), ("drop --host",)),
    ],
)
def test_options_that_cannot_be_met(options, words, ticket, tmp_path):
    prunectl("export", ticket, "--out", tmp_path / "out", *options).refused(2, *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none(ticket, tmp_path):
    (tmp_path / "file").write_text("precious")
    prunectl("export", ticket, "--out", tmp_path / "file").refused(2, "file is a file", "--out")
    prunectl("export", ticket, "--out", tmp_path / "file" / "below").refused(2, "file is a file", "--out")
    assert (tmp_path / "file").read_text() == "precious"


def test_not_a_run(tmp_path, monkeypatch):
    (tmp_path / "done.onnx").write_bytes(b"x")
    prunectl("export", tmp_path / "done.onnx").refused(2, "an ONNX file already", "--lint-only")
    (tmp_path / "done.onnx").unlink()
    (tmp_path / "thesis.txt").write_text("words")
    prunectl("export", tmp_path).refused(2, "holds no saved network")
    prunectl("export", tmp_path / "nothing").refused(2, "there is no run or saved network at")
    prunectl("export", tmp_path / "thesis.txt").refused(4, "thesis.txt")
    monkeypatch.chdir(tmp_path)
    prunectl("export").refused(2, "runs/latest")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_without_a_finished_model(a_copy):
    (a_copy / "result.json").unlink()
    before = sorted(a_copy.rglob("*"))
    prunectl("export", a_copy).refused(2, "unfinished run", "--resume")
    assert sorted(a_copy.rglob("*")) == before


def test_a_damaged_network(a_copy, tmp_path):
    weights = a_copy / "compact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    prunectl("export", a_copy, "--out", tmp_path / "out").refused(4, "damaged", "sha256")
    (a_copy / "compact" / "plan.json").write_text("{")
    prunectl("export", a_copy, "--out", tmp_path / "out").refused(4, "plan.json is damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"image_size": "large"}, {"mean": None}, {"classes": None}])
def test_a_plan_that_does_not_say_what_it_takes(changes, a_copy, tmp_path):
    path = a_copy / "compact" / "plan.json"
    plan = json.loads(path.read_text())
    plan["data"] |= changes
    path.write_text(json.dumps(plan))
    prunectl("export", a_copy, "--out", tmp_path / "out").refused(4, "plan.json does not say which images it takes")
    assert not (tmp_path / "out").exists()


def test_enough_before_the_file_is_measured_leaves_none(ticket, tmp_path):
    """Ctrl-C when the file is written and its accuracy is not known: it would look finished."""
    out = tmp_path / "out"

    def press():
        while not list(out.rglob("*.onnx")):
            time.sleep(1e-4)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    prunectl("export", ticket, "--profile", "orin", "--out", out, "-q").refused(130, "interrupted")
    assert list(out.iterdir()) == []


def test_a_file_that_is_less_accurate_than_its_run_is_not_left_behind(a_copy, tmp_path):
    result = json.loads((a_copy / "result.json").read_text())
    result["accuracy"]["final"] += 10
    (a_copy / "result.json").write_text(json.dumps(result))
    done = prunectl("export", a_copy, "--profile", "orin", "--out", tmp_path / "out")
    assert done.code == 4 and "where its run had" in done.err and len(done.err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("options", [("--precision", "int8"), ("--profile", "orin", "--sparsity", "2:4"), ("--sparsity", "0.5")])
def test_nothing_is_re_estimated_on_images_that_are_not_the_runs(options, a_copy, tmp_path):
    info = json.loads((a_copy / "run.json").read_text())
    (a_copy / "run.json").write_text(json.dumps(info | {"images": "0" * 64}))
    prunectl("export", a_copy, "--out", tmp_path / "out", "-q", *options).refused(4, "are not those that", "--data-dir")
    assert not (tmp_path / "out").exists()


def test_int8_of_a_run_that_was_more_accurate_is_refused(a_copy, tmp_path):
    result = json.loads((a_copy / "result.json").read_text())
    result["accuracy"]["final"] += 10
    (a_copy / "result.json").write_text(json.dumps(result))
    prunectl("export", a_copy, "--precision", "int8", "--out", tmp_path / "out", "-q").refused(4, "where its run had")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_of_another_run_is_not_replaced(ticket, tmp_path):
    _, path = exported(ticket, tmp_path, "--profile", "orin")
    exported(ticket, tmp_path, "--profile", "orin")
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace(ticket.name, "another-run"))
    prunectl("export", ticket, "--profile", "orin", "--out", tmp_path).refused(2, "of another run, another-run", "--out")


def test_what_a_killed_export_left_is_removed_by_the_next(ticket, tmp_path):
    (tmp_path / ".compact-orin-fp32.y7.tmp").mkdir()
    exported(ticket, tmp_path, "--profile", "orin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compact-orin-fp32.json", "compact-orin-fp32.onnx"]


@pytest.mark.parametrize("profile", ["tx2", "orin"])
def test_a_desktops_tensorrt_builds_nothing_for_a_board(profile, ticket, tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNECTL_JETSON", raising=False)
    desktop = tensorrt.Compiler("tensorrt", "10.3.0", ("NVIDIA GeForce RTX 3090 (SM86)",))
    monkeypatch.setattr(tensorrt, "local_compiler", lambda: desktop)
    assert engine.place(None, None) == engine.place(load_profile("gpu"), None) == desktop
    assert isinstance(engine.place(load_profile(profile), None), engine.Nowhere)


def test_without_its_images_a_file_is_compared_on_noise_and_int8_refused(a_copy, tmp_path):
    plan = a_copy / "compact" / "plan.json"
    plan.write_text(plan.read_text().replace('"name": "fashion-mini"', '"name": "mnist"'))
    done = prunectl("export", a_copy, "--profile", "orin", "--out", tmp_path / "out", "--json", "--data-dir", tmp_path)
    assert done.code == 0 and done.document["artifacts"][0]["accuracy"] is None
    assert any("compared on random images only" in w for w in done.document["warnings"])
    done = prunectl("export", a_copy, "--profile", "orin", "--precision", "int8", "--out", tmp_path / "int8", "--data-dir", tmp_path)
    done.refused(6, "mnist")
    assert not (tmp_path / "int8").exists()


def test_lint_only_on_any_file(ticket, tmp_path):
    _, newer = exported(ticket, tmp_path, "--profile", "cpu")
    done = prunectl("export", "--lint-only", newer, "--profile", "tx2")
    assert done.code == 4 and "mis-reads newer operators" in done.out and "3 findings that TensorRT 8.2 refuses or mis-reads" in done.err
    assert len(done.err.splitlines()) == 1
    findings = prunectl("export", "--lint-only", newer, "--profile", "tx2", "--json")
    assert findings.code == 4 and {"opset", "ir"} <= {f["rule"] for f in json.loads(findings.out)["lint"]}
    assert prunectl("export", "--lint-only", newer).code == 0
    prunectl("export", "nowhere", "--lint-only", newer, "--precision", "fp16").refused(2, "leave --precision and nowhere out")
    assert prunectl("export", "--lint-only", shutil.copy(newer, tmp_path / "named.json")).code == 0
    (tmp_path / "bad.onnx").write_bytes(newer.read_bytes()[: newer.stat().st_size // 2])
    prunectl("export", "--lint-only", tmp_path / "bad.onnx").refused(4, "not a readable ONNX file")
    prunectl("export", "--lint-only", tmp_path / "none.onnx").refused(2, "not a file")
    prunectl("export", "--lint-only", newer, "--trt", "--out", tmp_path).refused(2, "leave --trt and --out out")


def test_a_full_disk_leaves_no_file(ticket, tmp_path):
    """A file system of 16 kB, really full."""
    out = tmp_path / "out"
    out.mkdir()
    command = f"{sys.executable} -m prunectl export {ticket} --profile orin --out {out}"
    script = f"mount -t tmpfs -o size=16k none {out} && {command}; code=$?; echo left: $(ls -A {out}); exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "cannot be written (No space left on device)" in lines[0], done
    assert done.stdout.splitlines()[-1] == "left:", done.stdout


def test_a_bare_help_shows_an_example():
    done = installed("export", "--help")
    assert done.code == 0 and "Example: prunectl export runs/latest --profile tx2 --trt" in done.out
