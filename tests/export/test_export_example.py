import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_nets import SPEC
from PIL import Image

from prunectl.export import onnx
from prunectl.export.session import load_onnx_session, prepare

EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_onnx.py"


@pytest.mark.parametrize("fit", ["none", "pad", "resize", "resize-crop"])
@pytest.mark.parametrize(("batch", "pixels"), [(1, False), (3, True), (None, False)])
def test_the_example_agrees_with_the_library(tmp_path, network, orin, batch, pixels, fit):
    """On a wide picture larger than the network's images, and on one that a border has to bring to their size."""
    square = replace(SPEC, shape=(3, 16, 16), fit=fit)
    spec = square.of_pixels() if pixels else square
    onnx.save(
        onnx.lowered(onnx.build(network, square, orin, batch=batch), spec, orin, "fp32"), tmp_path / "m.onnx", spec=spec, profile=orin
    )
    session = load_onnx_session(tmp_path / "m.onnx")
    for name, size in (("wide.png", (20, 31, 3)), ("small.png", (11, 11, 3))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)).save(tmp_path / name)
        done = subprocess.run([sys.executable, EXAMPLE, tmp_path / "m.onnx", tmp_path / name], capture_output=True, text=True, check=True)
        logits = session.run(prepare(Image.open(tmp_path / name), session.spec))[0]
        chances = np.exp(logits) / np.exp(logits).sum()
        expected = [f"{100 * chances[i]:5.1f} %  {SPEC.classes[i]}" for i in np.argsort(-logits)]
        assert done.stdout.splitlines() == expected


def test_the_example_imports_nothing_of_ours():
    imports = [line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["json", "sys", "numpy", "onnxruntime", "PIL"]
