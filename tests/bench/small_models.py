"""Small convolutional networks as ONNX files, and as torch modules, of a chosen width."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from prunectl.bench.records import OnnxModel, TrainModel


def onnx_model(folder: Path, name: str, width: int, *, batch: int | str = 1, depth: int = 4) -> OnnxModel:
    """Convolutions of `width` channels on 32x32 images, opset 13, static shapes."""
    rng, nodes, weights, last, channels = np.random.default_rng(width), [], [], "input", 3
    for i in range(depth):
        weights.append(numpy_helper.from_array(rng.standard_normal((width, channels, 3, 3)).astype("f4") / 30, f"w{i}"))
        nodes += [
            helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        last, channels = f"r{i}", width
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["output"]))
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 32, 32])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, width, 1, 1])
    model = helper.make_model(helper.make_graph(nodes, name, [x], [y], weights), opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return OnnxModel(path, name)


def train_model(name: str, width: int, *, steps: int = 10) -> TrainModel:
    torch.manual_seed(width)
    layers = [
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
    ]
    module = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, 10))
    return TrainModel(module.eval(), name, (8, 3, 16, 16), 10, steps=steps, warmup_steps=2)
