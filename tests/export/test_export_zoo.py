"""Every registered network, dense and with half its channels gone, and what users bring from torchvision, for every profile.

Nothing may fail silently: an export passes its lint, answers as torch does, does the network's work, and compiles, or it
is in REFUSED with the reason. About half an hour on one core; run by hand, the table of docs/evidence/export.md kept, as

    OMP_NUM_THREADS=1 PRUNECTL_ZOO=benchmarks/results/export_zoo.json pytest -m slow tests/export/test_export_zoo.py
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prunectl import models
from prunectl.errors import PrunectlError
from prunectl.export import graph, lint, onnx, profiles, tensorrt, verify
from prunectl.export.artifact import InputSpec
from prunectl.pruning.allocate import layerwise, prunable
from prunectl.pruning.surgery import analyse, compact
from prunectl.versions import versions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OURS = models.models.names()
THEIRS = ["mobilenet_v2", "densenet121", "regnet_x_400mf", "efficientnet_b0", "convnext_tiny", "vit_b_16"]
CASES = [(n, kind) for n in OURS for kind in ("dense", "pruned")] + [(f"torchvision/{n}", "dense") for n in THEIRS]
PROFILES = ["cpu", "tx2", "orin", "rtx"]
REFUSED: dict[tuple[str, str], str] = {}  # (network, profile) -> words of the refusal
OLD_PYTHON = os.environ.get("PRUNECTL_PY36_ORT")
KEPT = os.environ.get("PRUNECTL_ZOO")  # a file for the table


@pytest.fixture(scope="module")
def table():
    """What every test adds its rows to; kept whatever fails."""
    rows = []
    yield rows
    print("\n" + "\n".join(json.dumps(row) for row in rows))
    if KEPT:
        about = {"versions": versions(), "profiles": PROFILES, "old_reader": bool(OLD_PYTHON)}
        Path(KEPT).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def network(name: str, kind: str, size: int) -> nn.Module:
    """BN statistics drawn, so that folding is no identity; no head left at zero; half the channels of every group removed."""
    net = models.build(name, num_classes=10, in_channels=3, image_size=size).eval()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for weight in net.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02, generator=generator)
    if kind == "dense":
        return net
    example = torch.zeros(1, 3, size, size)
    groups = prunable(analyse(net, example))
    scores = {group: torch.rand(channels, generator=generator) for group, channels in groups.items()}
    return compact(net, layerwise(scores, sparsity=0.5), example).module


def exported(net: nn.Module, spec: InputSpec, label: str, folder: Path) -> dict[str, object]:
    """What one profile made of a network: proven, linted, saved, and compiled or read by an old reader where that is here."""
    profile, path = profiles.load(label), folder / f"{label}.onnx"
    images = verify.random_batches(spec, n=2)
    model = onnx.build(net, spec, profile)
    found = verify.recount(net, model, spec)
    verify.require_cost(found)
    parity = verify.compare(net, verify.classifier(model, spec), images, images="random")
    verify.require_same(parity, "fp32")
    onnx.save(model, path, spec=spec, profile=profile)
    assert graph.opset(graph.read(path)) == profile.opset
    row = {"nodes": len(model.graph.node), "macs": found.macs, "max_rel": parity.max_rel}
    row["warnings"] = sorted({f.rule for f in lint.lint(path, profile)})
    if label == "rtx" and importlib.util.find_spec("tensorrt_rtx"):
        engine = tensorrt.build(path, tensorrt.rtx_compiler(("SM86",)), folder, profile=profile)
        row |= {"engine_bytes": engine.bytes, "engine_build_s": round(engine.build_s, 2)}
    if label == "tx2" and OLD_PYTHON:
        row["old_reader_max_rel"] = old_reader(path, net, images[0], folder)
    return row


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_network_for_every_profile(name, kind, tmp_path, table):
    size = 224 if name in ("torchvision/vit_b_16", "alexnet") else 64
    net = network(name, kind, size)
    spec = InputSpec((3, size, size), (0.5,) * 3, (0.25,) * 3, tuple(map(str, range(10))), "noise")
    refused = {}
    for label in PROFILES:
        row = {"network": name, "kind": kind, "size": size, "profile": label, "refused": None}
        try:
            row |= exported(net, spec, label, tmp_path)
        except PrunectlError as problem:
            refused[label] = row["refused"] = str(problem)
        table.append(row)
    expected = {label: words for (known, label), words in REFUSED.items() if known == name}
    assert refused.keys() == expected.keys(), refused
    assert all(words in refused[label] for label, words in expected.items())


def old_reader(path: Path, net: nn.Module, images: np.ndarray, folder: Path) -> float:
    """Largest difference to torch, relative, of one image under Python 3.6 and onnxruntime 1.10."""
    np.save(folder / "x.npy", images[:1])
    code = (
        "import sys, numpy, onnxruntime as o; s = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']);"
        "numpy.save(sys.argv[3], s.run(None, {'input': numpy.load(sys.argv[2])})[0])"
    )
    subprocess.run([OLD_PYTHON, "-c", code, path, folder / "x.npy", folder / "y.npy"], check=True)
    with torch.no_grad():
        exact = net(torch.from_numpy(images[:1])).numpy()
    off = np.abs(np.load(folder / "y.npy") - exact).max() / max(np.abs(exact).max(), 1e-30)
    assert off < verify.TOLERANCE["fp32"]
    return float(off)
