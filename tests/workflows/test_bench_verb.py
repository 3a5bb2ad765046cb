"""`prunectl bench` on this machine and from records: what is measured, in which order, under which names, and what is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import TINY, prunectl

from prunectl.bench.records import RawBench, Settings
from prunectl.errors import DeviceUnavailable, UnknownName, UsageError
from prunectl.workflows.bench_plan import plan

SWIFT = (
    "--warmup",
    "0.05",
    "--duration",
    "0.1",
    "--repeats",
    "3",
    "--threads",
    "1",
    "--set",
    "bench.iterations=5",
    "--set",
    "bench.idle_s=0.1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished find-ticket run: two epochs, drawn after the first."""
    out = tmp_path_factory.mktemp("found")
    done = prunectl("find-ticket", "resnet8", "fashion-mini", *TINY, "--epochs", "2", "--detector", "epoch:1", "--out", out)
    assert done.code == 0, done.err
    return out / "latest"


def measured(*words):
    done = prunectl("bench", *words, "--json")
    assert done.code == 0, done.err
    return done.document


@pytest.fixture(scope="module")
def trained(run):
    """The document of a bench with training."""
    return measured(run, *SWIFT, "--train", "--set", "bench.train_steps=4")


# ------------------------------------------------------------------------------------------------------ what is measured


def test_a_run_side_by_side(run, trained):
    assert (trained["run"], trained["model"], trained["dataset"], trained["seed"]) == (str(run.resolve()), "resnet8", "fashion-mini", 0)
    assert [(r["artifact"], r["precision"]) for r in trained["reports"]] == [("dense", "fp32"), ("compact", "fp32")]
    for report in trained["reports"]:
        assert report["n"] >= 15 and report["latency_ms"]["p50"] <= report["latency_ms"]["p90"] <= report["latency_ms"]["p99"]
        if report["energy"]["source"] is None:
            assert report["energy"]["mj_per_inference"] is None and "no power sensor answers" in report["energy"]["reason"]
        assert report["train"]["steps"] == 12 and report["train"]["ms_per_step"] > 0
    assert [r["metric"] for r in trained["ratios"] if r["metric"].endswith(("_ms", "step"))][:2] == ["latency_ms", "ms_per_step"]
    assert trained["settings"]["train_steps"] == 4 and trained["wall_s"] > 0
    raw = RawBench.read(Path(trained["raw"]))
    assert Path(trained["raw"]).parent == run.resolve() / "bench" and len([w for w in raw.windows if w.kind == "load"]) == 6


def test_files_are_exported_once(run, trained):
    before = {p: p.stat().st_mtime_ns for p in (run / "export").iterdir()}
    done = prunectl("bench", run, *SWIFT)
    assert done.code == 0 and "writing" not in done.out + done.err
    assert {p: p.stat().st_mtime_ns for p in (run / "export").iterdir()} == before
    assert "2 models on cpu, 3 windows of 0.1 s each, in turns: about 1 s" in done.out
    damaged = run / "export" / "compact-cpu-fp32.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert "writing compact-cpu-fp32.onnx" in prunectl("bench", run, *SWIFT).out


def test_the_baseline_comes_first_and_once(run, trained):
    for words in ((run, "--baseline", run / "compact"), (run / "compact", run / "dense", run / "export" / ".." / "compact")):
        document = measured(*words, *SWIFT)
        assert [r["artifact"] for r in document["reports"]] == ["compact", "dense"]
        assert (document["ratios"][0]["numerator"], document["ratios"][0]["denominator"]) == ("dense", "compact")


def test_a_file_and_a_run_and_names_told_apart(run, trained, tmp_path):
    """Another run's networks have the same names; where the samples go is the user's to say."""
    shutil.copytree(run.resolve(), tmp_path / "other")
    file = run / "export" / "dense-cpu-fp32.onnx"
    document = measured(file, run, tmp_path / "other" / "compact", *SWIFT, "--out", tmp_path / "samples")
    names = [r["artifact"] for r in document["reports"]]
    assert names[0] == "export/dense-cpu-fp32" and names[1:] == [
        f"{run.resolve().name}/dense",
        f"{run.resolve().name}/compact",
        "other/compact",
    ]
    assert Path(document["raw"]).parent == tmp_path / "samples"


def test_a_batch_and_another_precision(run, trained):
    document = measured(run / "dense", *SWIFT, "--batch", "4", "--precision", "int8")
    (report,) = document["reports"]
    assert (report["batch"], report["precision"]) == (4, "int8") and (run / "export" / "dense-b4-cpu-int8.onnx").is_file()


# --------------------------------------------------------------------------------------------------- joules from a record


def with_power(document, tmp_path, mw):
    """The record of a bench with the readings of a sensor that stood beside it: every 10 ms, mw(t_s, busy artifact or None)."""
    raw = json.loads(Path(document["raw"]).read_text())
    busy = [(w["start_ns"], w["end_ns"], w["artifact"]) for w in raw["windows"] if w["kind"] != "idle"]
    begin, end = busy[0][0] - 10**9, busy[-1][1] + 10**9
    t = list(range(begin, end, 10**7))
    values = [mw(s / 1e9, next((a for b, e, a in busy if b - 10**8 <= s <= e + 10**8), None)) for s in t]
    raw["power"] = {
        "source": "ina3221-iio", "reason": None, "period_ms": 10.0, "rails": [{"name": "VDD_IN", "unit": "mW", "wrap": None}],
        "t_ns": t, "values": {"VDD_IN": values}, "skipped": [], "sampler": None,
    }  # fmt: skip
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(raw))
    return path


def test_the_joules_of_a_whole_training(run, trained, tmp_path):
    """Of a record whose power is known: 5 W while the dense network trains, 4 W while the ticket does, with a little noise."""
    rng = random.Random(0)
    level = {2: 5000.0, 3: 4000.0}
    path = with_power(trained, tmp_path, lambda t, artifact: level.get(artifact, 2000.0) + rng.uniform(-5, 5))
    document = measured("--device", f"replay:{path}")
    dense, ticket = (r["train"] for r in document["reports"])
    windows = [w for w in RawBench.read(path).windows if w.kind == "train"]
    for train, artifact in ((dense, 2), (ticket, 3)):
        each = sorted(level[artifact] * (w.end_ns - w.start_ns) / 1e9 / 4 for w in windows if w.artifact == artifact)
        assert train["mj_per_step"] == pytest.approx(each[1], rel=0.02)  # noise of 0.1 %, and the edges of 10 ms samples
    # worked out again from the run: 200 images in batches of 50 for 2 epochs, drawn after 1; all else that was spent is
    # looking (probe, repair, batch norm), which costs as many dense steps as its FLOPs make
    result = json.loads((run / "result.json").read_text())
    step = {k: 3 * 2 * result["macs"][k] * 50 for k in ("dense", "ticket")}
    looking = result["training_flops"]["spent"] - 4 * step["dense"] - 4 * step["ticket"]
    assert looking > 0
    joules = {"dense": 8 * dense["mj_per_step"] / 1e3}
    joules["ticket"] = (4 + looking / step["dense"]) * dense["mj_per_step"] / 1e3 + 4 * ticket["mj_per_step"] / 1e3
    total = document["train_total_j"]
    assert total["dense"] == pytest.approx(joules["dense"]) and total["ticket"] == pytest.approx(joules["ticket"])
    assert total["ratio"] == pytest.approx(joules["ticket"] / joules["dense"]) and total["reason"] is None
    assert "whole training" in prunectl("bench", "--device", f"replay:{path}").out


def test_steps_are_those_of_the_batch_that_was_measured(run, trained, tmp_path):
    """Half the batch: twice the steps, the same images."""
    halved = RawBench.read(Path(measured(run, *SWIFT, "--train", "--set", "bench.train_steps=2", "--set", "bench.train_batch=25")["raw"]))
    own = RawBench.read(Path(trained["raw"]))
    assert {a.batch for a in own.artifacts if a.kind == "module"} == {50} and {a.batch for a in halved.artifacts if a.kind == "module"} == {
        25
    }
    for name in ("dense_steps", "search_steps", "ticket_steps"):
        assert getattr(halved.training, name) == pytest.approx(2 * getattr(own.training, name))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.update(source=None, reason="no power sensor answers", rails=[], t_ns=[], values={}), "no power sensor answers"),
        (lambda p: p.update(t_ns=[t - 10**12 * (i > len(p["t_ns"]) // 2) for i, t in enumerate(p["t_ns"])]), "clock of the samples jumped"),
        (lambda p: p["values"].update(VDD_IN=[3000] * len(p["t_ns"])), "does not update"),
        (lambda p: p["values"].update(VDD_IN=[None] * len(p["t_ns"])), "do not reach over the whole window"),
    ],
)
def test_no_joules_without_a_sensor_to_trust(trained, tmp_path, spoil, words):
    """Null and the reason, for an inference, a step and a training; latency stays."""
    path = with_power(trained, tmp_path, lambda t, artifact: 3000.0 + 100 * (artifact is not None) + (t * 1e3) % 7)
    raw = json.loads(path.read_text())
    spoil(raw["power"])
    path.write_text(json.dumps(raw))
    document = measured("--device", f"replay:{path}")
    total, last = document["train_total_j"], document["reports"][-1]["train"]
    assert words in total["reason"] and (total["dense"], total["ticket"], total["ratio"]) == (None, None, None)
    assert words in last["reason"] and last["mj_per_step"] is None and last["ms_per_step"] > 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw.update(windows=[]), "no window of inference"),
        (lambda raw: raw["artifacts"][1].update(name=raw["artifacts"][0]["name"]), "artifacts of one name"),
        (lambda raw: raw["windows"][-1].update(kind="foo"), "kind 'foo'"),
        (lambda raw: next(w for w in raw["windows"] if w["kind"] == "load").update(repeat=99), "load windows of repeats"),
        (lambda raw: next(w for w in raw["windows"] if w["kind"] == "load")["latency_ns"].append(-1), "below 0"),
    ],
)
def test_a_damaged_record_is_refused(trained, tmp_path, spoil, words):
    raw = json.loads(Path(trained["raw"]).read_text())
    spoil(raw)
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    prunectl("bench", "--device", f"replay:{tmp_path / 'raw.json'}").refused(4, words)


@pytest.mark.parametrize("network", ["dense", "compact"])
def test_a_training_total_needs_both_networks(run, trained, network):
    total = measured(run / network, *SWIFT, "--train", "--set", "bench.train_steps=1")["train_total_j"]
    assert total["ratio"] is None and total["reason"] == "needs the dense and the pruned network of one find-ticket run"


def test_what_a_start_cost_is_in_no_total(run, tmp_path):
    started = Path(shutil.copytree(run.resolve(), tmp_path / "started"))
    result = json.loads((started / "result.json").read_text())
    result["training_flops"] |= {"ratio": None, "reason": "what runs/dense cost is not known here"}
    (started / "result.json").write_text(json.dumps(result))
    total = measured(started, *SWIFT, "--train", "--set", "bench.train_steps=1")["train_total_j"]
    assert total["ratio"] is None and total["reason"] == "what runs/dense cost is not known here"


def test_the_networks_of_an_sfw_run(tmp_path):
    """The trained network, and beside it each one with its channels gone for good."""
    small = ("--set", "model.width=0.5", "--set", "data.train_images=200", "--set", "train.batch_size=50", "--bn-recal", "2")
    sfw = ("sfw-prune", "resnet8", "fashion-mini", *small, "--epochs", "1", "--constraint", "group-k-support", "--sparsity", "0.5")
    done = prunectl(*sfw, "--set", "sfw.channels=[0.3]", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    assert [r["artifact"] for r in measured(done.document["run"], *SWIFT)["reports"]] == ["model", "channels-0.3"]


NETS = """
from torch import nn
def wide(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 64, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
def deep(num_classes, in_channels):
    many = (m for _ in range(150) for m in (nn.Conv2d(2, 2, 1), nn.ReLU()))
    return nn.Sequential(nn.Conv2d(in_channels, 2, 9, stride=9), *many, nn.Flatten(), nn.Linear(18, num_classes))
"""


def test_fewer_macs_that_take_more_time_are_said(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    train = ("--epochs", "0", "--set", "data.train_images=100", "--out", tmp_path / "runs", "--json")
    wide, deep = (prunectl("train", f"{tmp_path}/nets.py:{name}", "fashion-mini", *train).document["run"] for name in ("wide", "deep"))
    said = measured(deep, *SWIFT, "--baseline", wide)
    (ratio,) = (r for r in said["ratios"] if r["metric"] == "latency_ms")
    slower = [w for w in said["warnings"] if "is slower here" in w]
    assert len(slower) == (ratio["differs"] and ratio["median"] > 1), "150 layers, each a call, take more time than one large layer"
    assert ratio["median"] > 1
    assert not [w for w in measured(wide, *SWIFT, "--baseline", deep)["warnings"] if "is slower here" in w]


def test_a_folder_that_takes_no_files_is_refused_before_anything_is_measured(run):
    """Whoever asks: to root, permissions say yes."""
    prunectl("bench", run, *SWIFT, "--out", "/proc/nothing").refused(2, "/proc/nothing cannot be written to")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nowhere",), 2, ("there is no run or saved network at",)),
        (("none.onnx",), 2, ("none.onnx is not a file",)),
        (("text.onnx",), 2, ("text.onnx is no ONNX file",)),
        (("--duration", "-3"), 2, ("duration_s = -3", "at least")),
        (("--repeats", "0"), 2, ("repeats = 0", "at least 1")),
        (("--repeats", "99999999"), 2, ("repeats = 99999999", "at most")),
        (("--warmup", "nan"), 2, ("warmup_s = nan",)),
        (("--batch", "0"), 2, ("--batch",)),
        (("--threads", "4096"), 2, ("may use",)),
        (("--precision", "fp8"), 2, ("fp8", "fp32, fp16 or int8")),
        (("--device", "jetsn"), 2, ("did you mean jetson",)),
        (("--device", "cpu", "--host", "tx2"), 2, ("--host tx2 and --device cpu",)),
        (("--profile", "tx3"), 2, ("tx3", "tx2")),
        (("--host", "tx2", "--profile", "tx2", "--precision", "int8"), 2, ("has no INT8",)),
        (("--recipe", "jetson"), 2, ("unknown bench recipe 'jetson'", "jetson-")),
        (("--set", "bench.repeat=3"), 2, ("unknown bench setting 'repeat'", "repeats")),
        (("--set", "bench.repeats=many"), 2, ("repeats = 'many'", "a whole number")),
        (("--set", "repeats=3"), 2, ("bench recipe 'repeats'", "bench.repeats")),
        (("--set", "bench=3"), 2, ("expected a section",)),
        (("--device", "replay"), 2, ("replay:FILE",)),
        (("--device", "replay:none.json"), 2, ("none.json", "raw.json")),
        (("--device", "replay:text.onnx"), 4, ("is not JSON",)),
    ],
)
def test_refused_in_one_sentence(run, trained, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("hello")
    paths = () if any(w.startswith("replay") or w.endswith(".onnx") or w == "nowhere" for w in words) else (run,)
    done = prunectl("bench", *paths, *words, "-q")
    done.refused(code, *said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.onnx"]


def test_no_gpu_is_said_before_anything_is_exported(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    prunectl("bench", run, "--device", "cuda").refused(5, "torch sees no CUDA GPU")
    prunectl("bench", run, "--device", "cuda:first").refused(2, "number of a GPU")
    assert not list((run / "export").glob("*-gpu-*"))


def test_what_cannot_be_is_said_before_anything_is_exported(run, tmp_path):
    (tmp_path / "file").write_text("precious")
    before = sorted(run.resolve().rglob("*"))
    for words, said in (
        (("--out", tmp_path / "file"), "file is a file"),
        (("--device", "cpu:1"), "there is one CPU"),
        (("--threads", "4096"), "may use"),
    ):
        prunectl("bench", run, "--batch", "7", *words).refused(2, said)
    assert sorted(run.resolve().rglob("*")) == before and (tmp_path / "file").read_text() == "precious"


@pytest.mark.slow
def test_a_run_that_is_read_only(run, trained, tmp_path):
    """Really read-only, for root too: samples, and files that the run has not yet, go to --out."""
    place = run.resolve()
    command = f"{sys.executable} -m prunectl bench {place} --batch 2 {' '.join(SWIFT)}"
    script = f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && {{ {command}; {command} --out {tmp_path}; }}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{place / 'bench'} cannot be written to" in done.stderr, done
    assert len(list(tmp_path.glob("raw-cpu-*.json"))) == 1
    assert (tmp_path / "dense" / "dense-b2-cpu-fp32.onnx").is_file() and (tmp_path / "compact" / "compact-b2-cpu-fp32.onnx").is_file()


def test_no_run_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prunectl("bench").refused(2, "there is no run or saved network at runs/latest")


def test_an_onnx_file_cannot_be_trained_nor_take_another_batch(run, trained):
    file = run / "export" / "dense-cpu-fp32.onnx"
    prunectl("bench", run, file, "--train").refused(2, "is an ONNX file and cannot be trained")
    prunectl("bench", file, "--batch", "8").refused(2, "takes 1 image a call", "--batch")
    prunectl("bench", run, "--device", "replay:raw.json").refused(2, "measures nothing")


def test_enough_is_enough(run, trained):
    """Ctrl-C in a window: one word, exit 130, no sampler left, no half-written record."""
    before = sorted((run / "bench").iterdir())
    command = [sys.executable, "-m", "prunectl", "bench", str(run), "--duration", "60", "-v"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "repeat 1" in line:
            break
    time.sleep(0.3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "error: interrupted\n" and "Traceback" not in out
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert sorted((run / "bench").iterdir()) == before


# ---------------------------------------------------------------------------------------------------------- the plan


def test_the_command_line_over_quick_over_the_recipe_over_the_device(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "device: jetson:nvidia@tx2\nprofile: tx2\nbench: {repeats: 7, duration_s: 33, workspace_mb: 99, python: python3.8 -B}\n"
    )
    resolved = plan(recipe=str(mine), quick=True, given={"bench.duration_s": 2.0}, sets=["bench.warmup_s=1"])
    settings = resolved.settings
    assert (resolved.device, resolved.target, resolved.profile) == ("jetson", "nvidia@tx2", "tx2")
    assert (settings.duration_s, settings.warmup_s, settings.repeats, settings.workspace_mb) == (2.0, 1, 5, 99)
    assert settings.python == ("python3.8", "-B") and settings.precision == "fp16"
    assert plan().settings == Settings.for_host() and plan(given={"device": "cpu"}, recipe=str(mine)).device == "cpu"


def test_shipped_recipes_by_name(monkeypatch):
    monkeypatch.setenv("PRUNECTL_JETSON", "nvidia@orin")
    orin = plan(recipe="jetson-orin")
    assert (orin.device, orin.target, orin.profile, orin.settings.workspace_mb) == ("jetson", "nvidia@orin", "orin", 4096)
    assert plan(recipe="bench/cpu").settings.threads is None
    with pytest.raises(UnknownName, match="jetson-tx2"):
        plan(recipe="jetson-tx")


def test_a_host_means_a_jetson(monkeypatch):
    monkeypatch.delenv("PRUNECTL_JETSON", raising=False)
    assert (plan(host="nvidia@tx2").device, plan(host="nvidia@tx2").target) == ("jetson", "nvidia@tx2")
    assert plan(sets=["bench.python=[docker,run,--rm,-i,image]"]).settings.python == ("docker", "run", "--rm", "-i", "image")
    with pytest.raises(UsageError, match="give one of them"):
        plan(host="a", given={"device": "jetson:b"})
    with pytest.raises(DeviceUnavailable, match="no Jetson"):
        plan(given={"device": "jetson"})
