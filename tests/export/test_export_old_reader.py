"""A reader as old as the board's: onnxruntime 1.10.0, the last for Python 3.6, loads what tx2 writes and nothing newer.

python3.6 -m venv old && old/bin/pip install pip==21.3.1 onnxruntime==1.10.0
PRUNECTL_PY36_ORT=old/bin/python pytest tests/export/test_export_old_reader.py
"""

import os
import subprocess

import numpy as np
import pytest
import torch
from export_nets import SPEC, images

from prunectl import models
from prunectl.export import onnx
from prunectl.export.artifact import InputSpec

PYTHON = os.environ.get("PRUNECTL_PY36_ORT")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PRUNECTL_PY36_ORT names no Python 3.6 with onnxruntime 1.10.0")
READ = """
import sys, numpy, onnxruntime
assert onnxruntime.__version__.startswith("1.10."), onnxruntime.__version__
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input": numpy.load(sys.argv[2])})[0])
"""


def old_answer(path, x, folder):
    np.save(folder / "x.npy", x)
    command = [PYTHON, "-c", READ, str(path), str(folder / "x.npy"), str(folder / "y.npy")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["tiny", "resnet8", "mobilenet-v2"])
def test_what_tx2_writes_gives_the_network_s_logits(name, tmp_path, network, tx2):
    spec = SPEC if name == "tiny" else InputSpec((3, 32, 32), SPEC.mean, SPEC.std, SPEC.classes, "d")
    net = network if name == "tiny" else models.build(name, num_classes=5, in_channels=3, image_size=32).eval()
    onnx.save(onnx.build(net, spec, tx2), tmp_path / "m.onnx", spec=spec, profile=tx2)
    x = images(1, spec=spec)
    done = old_answer(tmp_path / "m.onnx", x.numpy(), tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        exact = net(x).numpy()
    # float32 sums in another order; 1e-5 of the largest logit is ten times what was seen
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), exact, atol=1e-5 * np.abs(exact).max())


def test_what_cpu_writes_is_too_new_for_it(tmp_path, cpu_model):
    (tmp_path / "m.onnx").write_bytes(cpu_model.SerializeToString())
    done = old_answer(tmp_path / "m.onnx", images(1).numpy(), tmp_path)
    assert done.returncode != 0
    assert "opset" in done.stderr.lower() or "ir_version" in done.stderr.lower() or "IR version" in done.stderr
