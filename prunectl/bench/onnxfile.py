"""What a bench must know of an ONNX file that somebody else wrote: how many images a call takes, and which sizes stand open."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from prunectl.bench.records import OnnxModel
from prunectl.errors import UsageError


def opened(path: Path, name: str, batch: int | None) -> OnnxModel:
    """The file as a model to time. batch None: what the file fixes, else 1.

    Raises UsageError for a file that is no ONNX, lacks its weights, fixes another batch, or leaves a size other than the batch open."""
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError:
        raise UsageError(f"{path} is no ONNX file") from None
    weights = {tensor.name for tensor in graph.initializer}
    shapes = {i.name: [d.dim_value or None for d in i.type.tensor_type.shape.dim] for i in graph.input if i.name not in weights}
    if not shapes or not all(shapes.values()):
        raise UsageError(f"{path} is no network that takes images: expected an input of shape N x C x H x W")
    for input_name, sizes in shapes.items():
        if None in sizes[1:]:
            raise UsageError(f"{path}: input {input_name} leaves more than the batch open; export it with a fixed image size")
    fixed = next(iter(shapes.values()))[0]
    if fixed is not None and batch not in (None, fixed):
        raise UsageError(f"--batch {batch}: {path} takes {fixed} image{'s' * (fixed > 1)} a call; export it with that --batch")
    images = fixed or batch or 1
    free = [f"{k}:" + "x".join(map(str, (images, *v[1:]))) for k, v in shapes.items() if v[0] is None]
    beside = sorted({entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"})
    if missing := [file for file in beside if not (path.parent / file).is_file()]:
        raise UsageError(f"{path} keeps weights in {missing[0]}, which is not beside it")
    kind, files = precision_of(graph), tuple(path.parent / file for file in beside)
    return OnnxModel(path, name, images, ",".join(free) or None, precision=kind, typed=kind == "fp16", weights=files)


def precision_of(graph: onnx.GraphProto) -> str:
    """What a graph computes in: int8 where it quantizes, fp16 where it has such weights, else fp32."""
    if any("Quantize" in node.op_type or "QLinear" in node.op_type or node.op_type.endswith("Integer") for node in graph.node):
        return "int8"
    return "fp16" if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer) else "fp32"
