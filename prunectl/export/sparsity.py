"""What the zeros in an exported file are worth: their pattern, checked in the file, and the bytes they save.

Two different promises. N:M zeros (2:4) are skipped by tensor cores of Ampere and later, if they lie along the input
channels of every kernel position. Zeros in no pattern make a file that compresses well, and nothing else."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from prunectl.errors import VerificationFailed
from prunectl.export.graph import View


@dataclass(frozen=True)
class LayerZeros:
    """Zeros of one layer's weights. groups: blocks of m weights along the input channels; 0 if these are no multiple
    of m, or are split over several groups: then no pattern applies. broken: blocks with more than n values."""

    layer: str
    nonzero: int
    total: int
    groups: int
    broken: int


@dataclass(frozen=True)
class Zeros:
    """Zeros of a file's convolutions and linear layers. n of m: the pattern looked for, None if none was.

    bytes, compressed: of the serialised graph, and of it through zlib at its default level."""

    n: int | None
    m: int | None
    layers: tuple[LayerZeros, ...]
    bytes: int
    compressed: int

    @property
    def nonzero(self) -> int:
        return sum(layer.nonzero for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def statement(self) -> str:
        """What these zeros do and do not save, in one sentence."""
        share = 100 * (1 - self.nonzero / self.total) if self.total else 0.0
        size = f"the file compresses from {self.bytes / 1e6:.2f} to {self.compressed / 1e6:.2f} MB"
        if self.n is None:
            return f"{share:.1f} % of the weights are zero in no pattern: {size}, and every dense engine runs it at full price"
        fit = sum(1 for layer in self.layers if layer.groups and not layer.broken)
        return (
            f"{share:.1f} % of the weights are zero, {fit} of {len(self.layers)} layers in the pattern {self.n}:{self.m}, which "
            f"sparse tensor cores (Ampere and later) skip and everything else multiplies; {size}"
        )


def measure(model: ModelProto, *, n: int | None = None, m: int | None = None) -> Zeros:
    """The zeros of every layer that multiplies by stored weights; with n and m, also whether they keep that pattern."""
    view = View(model)
    layers = []
    for node in view.nodes:
        kernel = _kernel(view, node)
        if kernel is not None:
            groups, broken = _pattern(kernel, n, m, grouped=_grouped(node)) if n is not None and m is not None else (0, 0)
            layers.append(LayerZeros(view.name(node), int(np.count_nonzero(kernel)), kernel.size, groups, broken))
    data = model.SerializeToString()
    return Zeros(n, m, tuple(layers), len(data), len(zlib.compress(data)))


def require_pattern(zeros: Zeros) -> None:
    """Raises VerificationFailed if no layer could keep the pattern, or one that could has blocks that break it."""
    could = [layer for layer in zeros.layers if layer.groups]
    kept = [layer for layer in could if not layer.broken]
    if len(kept) < len(could) or not kept:
        worst = max(could, key=lambda layer: layer.broken, default=None)
        example = f", e.g. {worst.broken} of {worst.groups} blocks of {worst.layer}" if worst else ""
        raise VerificationFailed(
            f"the file is not {zeros.n}:{zeros.m} sparse: {len(kept)} of {len(could)} layers keep the pattern{example}; "
            f"export a network pruned with --constraint nm --n {zeros.n} --m {zeros.m}"
        )


def _kernel(view: View, node: NodeProto) -> NDArray[np.generic] | None:
    """The layer's weights as (outputs, inputs, positions)."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    tensor = view.weight(node.input[1])
    if tensor is None or len(tensor.dims) < 2:
        return None
    values = numpy_helper.to_array(tensor)
    if node.op_type == "Conv":
        return values.reshape(*values.shape[:2], -1)
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    maker = view.producer.get(node.input[1])
    turned = maker is not None and maker.op_type == "Transpose"
    values = values if transposed != turned else values.swapaxes(-1, -2)
    return values.reshape(-1, values.shape[-1], 1)


def _grouped(node: NodeProto) -> bool:
    return any(a.name == "group" and a.i > 1 for a in node.attribute)


def _pattern(kernel: NDArray[np.generic], n: int, m: int, *, grouped: bool) -> tuple[int, int]:
    """(blocks, blocks with more than n values) along the inputs, at every output and position."""
    outputs, inputs, positions = kernel.shape
    if grouped or inputs % m:
        return 0, 0
    blocks = np.count_nonzero(kernel.reshape(outputs, inputs // m, m, positions), axis=2)
    return blocks.size, int((blocks > n).sum())
