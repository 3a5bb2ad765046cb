"""Is the exported graph the network? Same outputs, same weights, same work, and how accurate the file itself is.

`compare`, `recount` and `accuracy` measure and return records; `require_same` and `require_cost` judge them. All run
the graph through ONNX Runtime on the CPU, from the very bytes that are written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from prunectl.errors import UsageError, VerificationFailed
from prunectl.export import graph
from prunectl.export.artifact import InputSpec
from prunectl.export.session import OnnxSession, open_session, pixels_of
from prunectl.pruning import cost

aten = torch.ops.aten

CHUNK = 32  # images that torch takes at once
# Largest difference of a logit, relative to the largest logit of the batch.
# fp32: both sides sum in FP32 but in another order; over 14 of torchvision's networks at 224 x 224 the difference was
#   at most 1.3e-6; 15 times that leaves room for deeper ones and other CPUs, and a wrong weight, axis or constant shows.
# fp16: a mantissa of 11 bits rounds by 5e-4, and the same networks were off by 3e-4 to 8e-4; deeper ones by more.
# int8: 8 bits for the widest value of a tensor round by 0.4 %, and outliers cost far more: off by more than the largest
#   logit is unrelated, anything less is decided by the accuracy of the file. Ranges are calibrated on real images, so
#   noise, which lies outside them, proves nothing.
TOLERANCE: Mapping[str, float] = {"fp32": 2e-5, "fp16": 1e-2, "int8": 1.0}


@dataclass(frozen=True)
class Parity:
    """Logits of a graph against the network's, over `n` images. Agreement is percent of images with the same top class.

    max_rel: max_abs over the network's largest logit. min_cosine: of the worst image. images: `real` or `random`."""

    images: str
    n: int
    max_abs: float
    max_rel: float
    min_cosine: float
    top1_agreement: float


@dataclass(frozen=True)
class Accuracy:
    """Percent of `n` labelled images whose label was first, or among the first five."""

    top1: float
    top5: float
    n: int


@dataclass(frozen=True)
class Recount:
    """The work and weights of a network and of its graph, for one image.

    Parameters are compared as kernel_params: the numbers that a convolution or a matrix product multiplies by and that
    do not depend on the input. Folding BN changes the sum of all parameters (scale and shift vanish into the kernels, a
    bias appears) but not this one."""

    kernel_params: int
    kernel_params_in_graph: int
    macs: int
    macs_in_graph: int


def classifier(model: ModelProto, spec: InputSpec) -> OnnxSession:
    """The graph in memory as ONNX Runtime runs it."""
    return OnnxSession(open_session(model.SerializeToString()), spec)


def compare(module: nn.Module, session: OnnxSession, batches: Iterable[Any], *, images: str = "real") -> Parity:
    """Both sides' logits over `batches` of normalised images (N, C, H, W); (images, labels) pairs are taken too.

    All images are held in memory: a few hundred prove as much as all.
    A graph that takes uint8 is compared on images rounded to whole grey levels, on both sides. Raises UsageError if
    there are no images, VerificationFailed if a logit is not a number or the shapes differ."""
    pieces = [np.asarray(b[0] if isinstance(b, tuple | list) else b, dtype=np.float32) for b in batches]
    if not pieces:
        raise UsageError("no images to compare the network with its export on; give at least one batch")
    values = np.concatenate(pieces)
    if session.spec.dtype == "uint8":
        values = _rounded(values, session.spec)
    network = copy.deepcopy(module).cpu().float().eval()
    with torch.no_grad():
        exact = torch.cat([network(piece) for piece in torch.from_numpy(values).split(CHUNK)])
    a, b = exact.double().numpy(), session.run_normalised(values).astype(np.float64)
    if a.shape != b.shape:
        raise VerificationFailed(f"the network returns logits of shape {a.shape} and the graph {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        side = "graph" if np.isfinite(a).all() else "network"
        raise VerificationFailed(f"the {side} returns logits that are no finite numbers")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    cosine[(a == b).all(1)] = 1  # nothing but zeros on both sides
    max_abs = float(np.abs(a - b).max())
    return Parity(
        images=images,
        n=len(a),
        max_abs=max_abs,
        max_rel=max_abs / max(float(np.abs(a).max()), 1e-30),
        min_cosine=float(cosine.min()),
        top1_agreement=100 * float((a.argmax(1) == b.argmax(1)).mean()),
    )


def random_batches(spec: InputSpec, *, n: int = 8, seed: int = 0) -> list[NDArray[np.float32]]:
    """One batch of noise over the whole range of pixels, normalised: what no photo holds, edges and channels unlike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *spec.shape))
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
    return [((pixels / 255 - mean) / std).astype(np.float32)]


def require_same(parity: Parity, precision: str) -> None:
    """Raises VerificationFailed if the graph's logits are further from the network's than `precision` explains.

    precision: of the graph, so `fp32` where FP16 is a flag of the engine build. INT8 is judged on real images only."""
    if precision == "int8" and parity.images == "random":
        return
    if parity.max_rel >= TOLERANCE[precision]:  # a graph that answers 0 to everything is off by 1
        advice = "calibrate on more images, or use fp16" if precision == "int8" else "export again and report this network"
        raise VerificationFailed(
            f"the exported graph is not the network: on {parity.n} {parity.images} images its logits are off by up to "
            f"{parity.max_rel:.2g} of the largest ({precision} explains {TOLERANCE[precision]:g}), "
            f"top-1 agreement {parity.top1_agreement:.1f} %; {advice}"
        )


def recount(module: nn.Module, model: ModelProto, spec: InputSpec) -> Recount:
    """Weights and MACs of both sides, each counted from what it is."""
    counted = graph.cost(model)
    with sdpa_kernel(SDPBackend.MATH):  # attention as the products that it is; fused, it is not counted
        macs = cost.count(module, spec.shape).macs
    return Recount(
        kernel_params=_kernel_params(module, spec),
        kernel_params_in_graph=counted.kernel_params,
        macs=macs,
        macs_in_graph=counted.macs,
    )


def require_cost(found: Recount) -> str | None:
    """Raises VerificationFailed if the graph does more work, or holds more weights, than the network; says where it has less.

    Less may be right in a graph whose answers are the same: products of constants are worked out when it is written, equal
    kernels stored once, kernels that a zero scale silences left out, and sums in Einstein's notation not counted."""
    work = f"the network needs {found.macs:,} MACs an image and the exported graph {found.macs_in_graph:,}"
    weights = f"the network multiplies by {found.kernel_params:,} weights and the exported graph by {found.kernel_params_in_graph:,}"
    for sentence, ours, theirs in ((work, found.macs, found.macs_in_graph), (weights, found.kernel_params, found.kernel_params_in_graph)):
        if theirs > ours:
            raise VerificationFailed(sentence)
        if theirs < ours:
            return sentence
    return None


def accuracy(session: OnnxSession, batches: Iterable[tuple[Any, Any]]) -> Accuracy:
    """Of a file or a graph, over batches of normalised images and labels, as the data set yields them."""
    first, five, n = 0, 0, 0
    for images, labels in batches:
        truth = np.asarray(labels).reshape(-1, 1)
        ranked = np.argsort(-session.run_normalised(images), axis=1, kind="stable")[:, :5]
        first += int((ranked[:, :1] == truth).sum())
        five += int((ranked == truth).sum())
        n += len(truth)
    if not n:
        raise UsageError("no images to measure the accuracy of the file on; give at least one batch")
    return Accuracy(100 * first / n, 100 * five / n, n)


def _rounded(values: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
    return np.asarray((pixels_of(values, spec) / 255 - mean) / std, dtype=np.float32)


def _kernel_params(module: nn.Module, spec: InputSpec) -> int:
    """Numel of the distinct operands of convolutions and products that do not depend on the input and are not all zero.

    They are told by autograd: with the weights frozen and the input not, exactly these need no gradient."""
    twin = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    images = torch.zeros(1, *spec.shape, requires_grad=True)
    with torch.enable_grad(), _Operands() as operands:
        twin(images * 1)  # not a leaf, so that a network may change it in place
    return sum(operands.sizes.values())


class _Operands(TorchDispatchMode):
    """Collects the sizes of input-independent operands by where they lie in memory, so that shared ones count once.

    An operand of nothing but zeros is left out, as in `graph.cost`."""

    PRODUCTS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed tensor's place could be taken by the next one

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            for operand in args:
                if isinstance(operand, Tensor) and operand.ndim >= 2 and not operand.requires_grad and operand.any():
                    stored = operand.untyped_storage().nbytes() // operand.element_size()
                    self.sizes[operand.data_ptr()] = min(operand.numel(), stored)  # an expanded one repeats what is stored
                    self._alive.append(operand)
        return func(*args, **(kwargs or {}))
