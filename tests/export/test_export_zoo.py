"""Every registered network, dense and with half its channels gone, and what users bring from torchvision, for every profile.

Nothing may fail silently: an export passes its lint, answers as torch does, does the network's work, and compiles, or it
is in REFUSED with the reason. Minutes long; run by hand, with a table, as

    pytest -m slow -s tests/export/test_export_zoo.py
"""

import importlib.util
import os
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from prunectl import models
from prunectl.errors import PrunectlError
from prunectl.export import graph, onnx, profiles, tensorrt, verify
from prunectl.export.artifact import InputSpec
from prunectl.pruning.allocate import layerwise, prunable
from prunectl.pruning.surgery import analyse, compact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OURS = models.models.names()
THEIRS = ["mobilenet_v2", "densenet121", "regnet_x_400mf", "efficientnet_b0", "convnext_tiny", "vit_b_16"]
CASES = [(n, kind) for n in OURS for kind in ("dense", "pruned")] + [(f"torchvision/{n}", "dense") for n in THEIRS]
PROFILES = ["cpu", "tx2", "orin", "rtx"]
REFUSED: dict[tuple[str, str], str] = {}
OLD_PYTHON = os.environ.get("PRUNECTL_PY36_ORT")


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


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_network_for_every_profile(name, kind, tmp_path):
    size = 224 if name in ("torchvision/vit_b_16", "alexnet") else 64
    net = network(name, kind, size)
    spec = InputSpec((3, size, size), (0.5,) * 3, (0.25,) * 3, tuple(map(str, range(10))), "noise")
    images = verify.random_batches(spec, n=2)
    rows = []
    for label in PROFILES:
        profile = profiles.load(label)
        path = tmp_path / f"{label}.onnx"
        try:
            model = onnx.build(net, spec, profile)
            found = verify.recount(net, model, spec)
            verify.require_cost(found)
            parity = verify.compare(net, verify.classifier(model, spec), images, images="random")
            verify.require_same(parity, "fp32")
            onnx.save(model, path, spec=spec, profile=profile)
            note = f"{len(model.graph.node)} nodes, {found.macs / 1e6:.1f} M MACs, off by {parity.max_rel:.1e}"
            if label == "rtx" and importlib.util.find_spec("tensorrt_rtx"):
                engine = tensorrt.build(path, tensorrt.rtx_compiler(("SM86",)), tmp_path, profile=profile)
                note += f", engine of {engine.bytes / 1e6:.1f} MB in {engine.build_s:.1f} s"
            if label == "tx2" and OLD_PYTHON:
                note += f", ONNX Runtime 1.10 off by {old_reader(path, net, images[0], tmp_path):.1e}"
            assert (name, label) not in REFUSED, "it is expected to be refused, and was not"
        except PrunectlError as problem:
            if (name, label) not in REFUSED or REFUSED[name, label] not in str(problem):
                raise
            note = f"refused: {problem}"
        rows.append(f"{name:28} {kind:7} {label:5} {note}")
    print("\n" + "\n".join(rows))
    assert graph.opset(graph.read(tmp_path / "cpu.onnx")) == 18


def old_reader(path, net, images, folder) -> float:
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
