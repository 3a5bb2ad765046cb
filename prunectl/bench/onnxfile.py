"""What a bench must know of an ONNX file that somebody else wrote: how many images a call takes, and which sizes stand open."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from prunectl.bench.records import OnnxModel
from prunectl.errors import UsageError


def opened(path: Path, name: str, batch: int | None) -> OnnxModel:
    """The file as a model to time. batch None: what the file fixes, else 1.

    Raises UsageError for a file that is no ONNX, another batch than it fixes, or a size other than the batch that stands open."""
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
    return OnnxModel(path, name, images, ",".join(free) or None)
