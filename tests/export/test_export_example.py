import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_nets import SPEC
from PIL import Image

from prunectl.export import onnx
from prunectl.export.session import load_onnx_session

EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_onnx.py"


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("pixels", [False, True])
def test_the_example_agrees_with_the_library(tmp_path, network, orin, batch, pixels):
    spec = SPEC.of_pixels() if pixels else SPEC
    onnx.save(onnx.lowered(onnx.build(network, SPEC, orin, batch=batch), spec, orin, "fp32"), tmp_path / "m.onnx", spec=spec, profile=orin)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8))
    image.save(tmp_path / "i.png")
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path / "m.onnx", tmp_path / "i.png"], capture_output=True, text=True, check=True)
    logits = load_onnx_session(tmp_path / "m.onnx").run(np.asarray(image))[0]
    chances = np.exp(logits) / np.exp(logits).sum()
    expected = [f"{100 * chances[i]:5.1f} %  {SPEC.classes[i]}" for i in np.argsort(-logits)]
    assert done.stdout.splitlines() == expected


def test_the_example_imports_nothing_of_ours():
    imports = [line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["json", "sys", "numpy", "onnxruntime", "PIL"]
