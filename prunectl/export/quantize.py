"""Fewer bits: FP16 by rewriting the graph, INT8 by calibration after training (Q/DQ nodes around what is quantised).

TensorRT and ONNX Runtime want different Q/DQ graphs, so there are two functions. TensorRT: signed, symmetric, no
quantised bias (it rejects the INT32 DequantizeLinear of onnxruntime's defaults), and only the inputs of convolutions
and products are quantised, so that Conv + ReLU still fuse. ONNX Runtime on x86: unsigned activations, for its U8S8
kernels, and quantised biases, without which its integer convolution is not used (measured: ResNet-18 at 224 x 224 on
2 threads of an AVX512-VNNI machine took 61 ms in FP32, 19 ms this way, and 48 to 119 ms with TensorRT's settings)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, StringStringEntryProto

from prunectl.errors import DeviceUnavailable, UsageError
from prunectl.export import graph
from prunectl.export.session import PIECE, open_session

PRODUCTS = ["Conv", "Gemm", "MatMul"]
FP16_MAX = 65504.0
Images = NDArray[np.float32]


@dataclass(frozen=True)
class LayerError:
    """How far one layer's output moved. signal_to_noise_db: power of the exact output over that of the difference."""

    layer: str
    operator: str
    signal_to_noise_db: float


def can_halve() -> bool:
    """Whether what writes FP16 graphs is installed."""
    return find_spec("onnxconverter_common") is not None


def to_fp16(model: ModelProto) -> ModelProto:
    """The graph computing in FP16, with float32 input and output.

    Raises DeviceUnavailable if onnxconverter-common is not installed."""
    try:
        from onnxconverter_common import float16
    except ImportError:
        raise DeviceUnavailable("FP16 graphs are written by onnxconverter-common: pip install 'prunectl[fp16]'") from None
    out = ModelProto()
    out.CopyFrom(model)
    # its defaults would lift small weights to 1e-7 and cut large ones at 1e4; FP16 has subnormals and ends at 65504
    halved: ModelProto = float16.convert_float_to_float16(out, min_positive_val=0.0, max_finite_val=FP16_MAX, keep_io_types=True)
    return halved


def beyond_fp16(model: ModelProto, images: Images) -> list[tuple[str, float]]:
    """(node, its largest magnitude) wherever an FP32 graph has a value on `images` that FP16 cannot hold, the largest first.

    images: normalised float32 (N, C, H, W), looked at few at a time."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = {i.name for i in (*inferred.value_info, *inferred.output) if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    made = {name: node.name or node.op_type for node in model.graph.node for name in node.output if name in floats}
    largest = dict.fromkeys(made, 0.0)
    size = graph.static_batch(model) or 2
    enough = np.resize(images, (-(-len(images) // size) * size, *images.shape[1:]))  # the last piece filled up with the first images
    for piece in _pieces([enough], size):
        for name, values in _activations(model, list(made), piece).items():
            largest[name] = max(largest[name], float(np.abs(values).max(initial=0)))
    return sorted(((made[name], top) for name, top in largest.items() if not top <= FP16_MAX), key=lambda found: -found[1])


def for_cpu(model: ModelProto, calibration: Iterable[Any]) -> ModelProto:
    """The graph with Q/DQ nodes for ONNX Runtime: unsigned activations, signed weights per channel in 7 bits, INT32 biases.

    7 bits, because x86 processors without VNNI add pairs of products in 16 bits, which products with 8-bit weights overflow.

    calibration: batches of normalised float32 (N, C, H, W), arrays or tensors. Raises UsageError if there are none."""
    from onnxruntime.quantization import QuantType

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return _quantised(model, calibration, reduce_range=True, **types)


def for_tensorrt(model: ModelProto, calibration: Iterable[Any]) -> ModelProto:
    """The graph with Q/DQ nodes that every TensorRT from 8.5 on reads: symmetric, weights per channel, FP32 biases.

    Weights stay FP32 in the file, each behind its own Q/DQ pair; the engine stores them in 8 bits.
    calibration: batches of normalised float32 (N, C, H, W), arrays or tensors. Raises UsageError if there are none."""
    from onnxruntime.quantization import QuantType

    options = {
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "OpTypesToExcludeOutputQuantization": PRODUCTS,
    }
    return _quantised(
        model,
        calibration,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=PRODUCTS,
        extra_options=options,
    )


def layer_errors(model: ModelProto, quantised: ModelProto, images: NDArray[Any]) -> list[LayerError]:
    """Every convolution's and product's error in `quantised`, worst first: where an INT8 file lost its accuracy.

    images: as both graphs take them, as many as in one call. Errors of earlier layers are included."""
    nodes = [n for n in model.graph.node if n.op_type in PRODUCTS]
    rounded_nodes = quantised.graph.node
    made = {name for n in rounded_nodes for name in n.output}
    # where a ReLU became part of the quantised layer, its output took the place of the layer's
    activated = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type in ("Relu", "Clip")}
    outputs = [n.output[0] if n.output[0] in made else activated[n.output[0]] for n in nodes]
    coded = {n.input[0]: n.output[0] for n in rounded_nodes if n.op_type == "QuantizeLinear"}
    decoded = {n.input[0]: n.output[0] for n in rounded_nodes if n.op_type == "DequantizeLinear"}
    taps = [decoded.get(coded.get(name, ""), name) for name in outputs]
    exact, rounded = _activations(model, outputs, images), _activations(quantised, taps, images)
    errors = []
    for node, output, tap in zip(nodes, outputs, taps, strict=True):
        noise = float(np.mean((exact[output] - rounded[tap]) ** 2))
        signal = float(np.mean(exact[output] ** 2))
        errors.append(LayerError(node.name, node.op_type, 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))))
    return sorted(errors, key=lambda e: e.signal_to_noise_db)


def _quantised(model: ModelProto, calibration: Iterable[Any], **options: Any) -> ModelProto:
    from onnxruntime.quantization import QuantFormat, quantize_static

    reader = _Reader(model.graph.input[0].name, graph.static_batch(model), calibration)
    prepared = ModelProto()
    prepared.CopyFrom(model)
    # Says that shapes are inferred, which they are; without it onnxruntime advises to optimise the graph, which TensorRT must not get.
    prepared.metadata_props.append(StringStringEntryProto(key="onnx.quant.pre_process", value="onnxruntime.quant"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_static(prepared, path, reader, quant_format=QuantFormat.QDQ, per_channel=True, **options)
        out = onnx.load(str(path))
    del out.metadata_props[:]
    return out


class _Reader:
    """Calibration images the way onnxruntime asks for them. Raises UsageError if there is not even one piece."""

    def __init__(self, name: str, batch: int | None, calibration: Iterable[Any]) -> None:
        self.name = name
        pieces = _pieces(calibration, batch)
        first = next(pieces, None)
        if first is None:
            raise UsageError(f"int8 needs calibration images, at least {batch or 1}; give some of the training split")
        self._pieces = chain([first], pieces)

    def get_next(self) -> dict[str, Images] | None:
        piece = next(self._pieces, None)
        return None if piece is None else {self.name: piece}


def _pieces(calibration: Iterable[Any], batch: int | None) -> Iterator[Images]:
    """The images in pieces of the graph's own batch size, of which the rest is left out; in small ones if it has none."""
    left: Images | None = None
    for images in calibration:
        array = np.asarray(images, dtype=np.float32)
        left = array if left is None else np.concatenate([left, array])
        size = batch or PIECE
        whole = len(left) - len(left) % size if batch else len(left)
        yield from (left[start : start + size] for start in range(0, whole, size))
        left = left[whole:]


def _activations(model: ModelProto, names: list[str], images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    tapped = ModelProto()
    tapped.CopyFrom(model)
    known = {o.name for o in model.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = open_session(tapped.SerializeToString())
    return dict(zip(names, session.run(names, {model.graph.input[0].name: images}), strict=True))
