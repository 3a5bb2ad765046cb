"""An ONNX graph read and rewritten as plain data: who makes a tensor, which tensors are constants, what it costs.

Nothing here runs a network or knows a target. Functions that rewrite return a new model; none changes its argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from prunectl.errors import CorruptFile, UsageError, VerificationFailed

STANDARD = ("", "ai.onnx")
# What a weight may pass through between the file and the layer that multiplies by it.
CARRIERS = ("Identity", "Transpose", "Cast", "QuantizeLinear", "DequantizeLinear", "Reshape", "Unsqueeze")
FRONT = "pixels_to_input"
EXTERNAL = "prunectl.external_weights"  # metadata of a model read from several files: which weights lay outside


@dataclass(frozen=True)
class Cost:
    """What a graph stores and does, for one image.

    params: numbers in the file's floating-point or quantised weights, after BN was folded in. kernel_params: those that
    a convolution or a matrix product multiplies by, layers of nothing but zeros left out, which exporters store once for
    several; folding BN leaves this number alone, so it equals the network's.
    macs: multiply-accumulates of convolutions and matrix products."""

    params: int
    kernel_params: int
    macs: int


class View:
    """A model with its nodes, constants and shapes looked up once. Read-only."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model

    @cached_property
    def nodes(self) -> tuple[NodeProto, ...]:
        """Every node, those inside If, Loop and Scan and local functions too."""
        bodies = [self.model.graph.node, *(f.node for f in self.model.functions)]
        return tuple(node for body in bodies for top in body for node in _nested(top))

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        bodies = [self.model.graph, *(a.g for node in self.nodes for a in node.attribute if a.HasField("g"))]
        return {t.name: t for body in bodies for t in body.initializer}

    @cached_property
    def producer(self) -> dict[str, NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def uses(self) -> Counter[str]:
        """How often each tensor is read; a graph output counts as read."""
        read = Counter(name for node in self.nodes for name in node.input if name)
        return read + Counter(out.name for out in self.model.graph.output)

    @cached_property
    def names(self) -> dict[int, str]:
        """id(node) -> its name, or operator and position where it has none."""
        return {id(node): node.name or f"{node.op_type}_{i}" for i, node in enumerate(self.nodes)}

    def name(self, node: NodeProto) -> str:
        return self.names[id(node)]

    def constant(self, name: str) -> TensorProto | None:
        """The initializer or Constant behind a tensor's name, if that is what it is."""
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant":
            return None
        return next((a.t for a in node.attribute if a.name == "value"), None)

    def weight(self, name: str) -> TensorProto | None:
        """The constant that reaches a tensor through nothing but casts, transposes and quantisation."""
        while True:
            found = self.constant(name)
            node = self.producer.get(name)
            if found is not None or node is None or node.op_type not in CARRIERS:
                return found
            name = node.input[0]

    def values(self, name: str) -> NDArray[np.generic] | None:
        tensor = self.constant(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    @cached_property
    def inferred(self) -> ModelProto:
        try:
            return onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        except onnx.shape_inference.InferenceError as problem:
            raise CorruptFile(f"the ONNX graph contradicts itself ({str(problem).splitlines()[0]}); export it again") from problem

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor whose shape is fully known."""
        known = {t.name: tuple(t.dims) for t in self.model.graph.initializer}
        graph = self.inferred.graph
        for info in [*graph.input, *graph.output, *graph.value_info]:
            dims = info.type.tensor_type.shape.dim
            if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                known[info.name] = tuple(d.dim_value for d in dims)
        for node in self.nodes:
            constant = self.constant(node.output[0]) if node.op_type == "Constant" else None
            if constant is not None:
                known[node.output[0]] = tuple(constant.dims)
        return known


def read(path: Path) -> ModelProto:
    """The model in an ONNX file. Raises UsageError if there is none, CorruptFile if it is not a whole ONNX model."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file; expected an ONNX model")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
        outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, ValueError) as problem:
        raise CorruptFile(f"{path} is not a readable ONNX file ({problem}); export it again") from problem
    except (OSError, onnx.checker.ValidationError) as problem:
        raise CorruptFile(f"{path} keeps weights in other files that cannot be read ({problem}); copy them beside it") from problem
    if odd := [n for n in model.graph.node if not isinstance(n.op_type, str) or not isinstance(n.name, str)]:
        raise CorruptFile(f"{path} has {len(odd)} nodes whose names are no text; export it again")
    if not model.graph.node or not model.opset_import:
        raise CorruptFile(f"{path} holds no ONNX graph; export it again")
    if outside:
        model.metadata_props.append(onnx.StringStringEntryProto(key=EXTERNAL, value=" ".join(outside)))  # loading clears the marks
    return model


def opset(model: ModelProto) -> int:
    """The version of the standard operators; 0 if the model imports none."""
    return max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)


def static_batch(model: ModelProto) -> int | None:
    """The number of images the first input takes; None if it is free."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value if dims and dims[0].HasField("dim_value") else None


def with_batch(model: ModelProto, batch: int) -> ModelProto:
    """The model with its free batch dimension fixed; inner shapes are left to be inferred."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for info in [*fixed.graph.input, *fixed.graph.output]:
        for dim in info.type.tensor_type.shape.dim[:1]:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    del fixed.graph.value_info[:]
    return fixed


def without_identities(model: ModelProto) -> ModelProto:
    """The same function without Identity nodes, but for one that makes a graph output of an input or a constant."""
    graph = ModelProto()
    graph.CopyFrom(model)
    outputs = {o.name for o in graph.graph.output}
    alias: dict[str, str] = {}
    kept = []
    for node in graph.graph.node:
        if node.op_type == "Identity" and node.output[0] not in outputs:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for top in kept:
        for node in _nested(top):
            node.input[:] = [alias.get(name, name) for name in node.input]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    return graph


def with_pixel_input(model: ModelProto, mean: tuple[float, ...], std: tuple[float, ...]) -> ModelProto:
    """The model taking uint8 pixels in place of its normalised first input: (x / 255 - mean) / std, in FP32.

    The layout stays NCHW, so that only the type of the input changes: no Transpose is added, which TensorRT could not
    fuse into a uint8 input, and on the caller's side HWC -> CHW is a view. Written as one Mul and one Sub, the exact
    operations of the training loader. Raises UsageError if the input is not float32."""
    info = model.graph.input[0]
    if info.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise UsageError(f"input '{info.name}' is not float32; pixels can only be put in front of a float32 input")
    out = ModelProto()
    out.CopyFrom(model)
    name = out.graph.input[0].name
    shape = (1, len(mean), 1, 1)
    scale = np.array([1 / (255 * s) for s in std], np.float32).reshape(shape)
    offset = np.array([m / s for m, s in zip(mean, std, strict=True)], np.float32).reshape(shape)
    for top in out.graph.node:
        for node in _nested(top):
            node.input[:] = [f"{FRONT}.out" if i == name else i for i in node.input]
    front = [
        helper.make_node("Cast", [name], [f"{FRONT}.float"], f"{FRONT}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{FRONT}.float", f"{FRONT}.scale"], [f"{FRONT}.scaled"], f"{FRONT}.mul"),
        helper.make_node("Sub", [f"{FRONT}.scaled", f"{FRONT}.offset"], [f"{FRONT}.out"], f"{FRONT}.sub"),
    ]
    body = list(out.graph.node)
    del out.graph.node[:]
    out.graph.node.extend([*front, *body])
    out.graph.initializer.extend([numpy_helper.from_array(scale, f"{FRONT}.scale"), numpy_helper.from_array(offset, f"{FRONT}.offset")])
    out.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return out


def cost(model: ModelProto) -> Cost:
    """Parameters and MACs counted from the graph, for one image. Raises VerificationFailed if a shape cannot be inferred."""
    batch = static_batch(model) or 1
    view = View(with_batch(model, batch))
    kernels: dict[str, int] = {}
    macs = 0
    for node in view.nodes:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        for name in node.input[:2]:
            tensor = view.weight(name)
            if tensor is not None and len(tensor.dims) >= 2 and numpy_helper.to_array(tensor).any():
                kernels[tensor.name] = math.prod(tensor.dims)
        macs += _macs(view, node)
    return Cost(sum(_stored(view)), sum(kernels.values()), macs // batch)


def _macs(view: View, node: NodeProto) -> int:
    shapes = [view.shapes.get(name) for name in (*node.input[:2], node.output[0])]
    if None in shapes:
        raise VerificationFailed(f"node {view.name(node)} ({node.op_type}): its shapes cannot be inferred, so its MACs cannot be counted")
    a, b, out = (s or () for s in shapes)
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(b[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * a[0 if transposed else -1]


def _stored(view: View) -> Iterator[int]:
    """Sizes of the stored weights; scalars, scales, zero points, shapes and the pixel front are no parameters."""
    weights = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8)
    quantisation = {name for node in view.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear") for name in node.input[1:]}
    biases = {n.input[0] for n in view.nodes if n.op_type == "DequantizeLinear"}
    for name, tensor in view.initializers.items():
        counted = tensor.data_type in weights or (tensor.data_type == TensorProto.INT32 and name in biases)
        if counted and tensor.dims and name not in quantisation and not name.startswith(FRONT):
            yield math.prod(tensor.dims)


def _nested(node: NodeProto) -> Iterator[NodeProto]:
    yield node
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield from _nested(inner)
