"""What a profile's reader would refuse, or silently mis-read, in an ONNX file.

TensorRT's old parsers check little: given a newer file they read what they know and ignore the rest. So every rule
says which node, which operator and what to do. Rules ask a profile what its reader takes, never its name; a rule is a
function of (View, Profile), and RULES is the list of them. Facts about TensorRT come from the importers of
https://github.com/onnx/onnx-tensorrt, branches release/8.2-GA, release/8.5-GA and release/10.0-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from prunectl.errors import VerificationFailed
from prunectl.export import graph
from prunectl.export.graph import View
from prunectl.export.profiles import Profile


@dataclass(frozen=True)
class Finding:
    """One thing in a file that its reader does not take. `error`: refused or mis-read; `warning`: works, but worse.

    node: its name, or the tensor's or the file's if it is about no node; operator: empty then."""

    node: str
    operator: str
    rule: str
    message: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.operator} '{self.node}'" if self.operator else self.node
        return f"{where}: {self.message}; {self.remedy} [{self.rule}]"


Rule = Callable[[View, Profile], Iterator[Finding]]


def lint(model: ModelProto | Path, profile: Profile) -> list[Finding]:
    """Everything that `profile`'s reader does not take, errors first. Empty means: nothing known against the file.

    Raises UsageError if a path is no file, CorruptFile if it is not a whole ONNX model."""
    view = View(graph.read(model) if isinstance(model, Path) else model)
    findings = [finding for rule in RULES for finding in rule(view, profile)]
    return sorted(findings, key=lambda f: f.severity != "error")


def require_clean(findings: Sequence[Finding], profile: Profile) -> None:
    """Raises VerificationFailed with the errors among `findings`; warnings pass."""
    errors = [f for f in findings if f.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise VerificationFailed(f"not a file for {profile.reader}: {' | '.join(map(str, errors[:3]))}{more}")


# Rules about the file


def valid(view: View, profile: Profile) -> Iterator[Finding]:
    """The graph obeys the ONNX standard."""
    try:
        onnx.checker.check_model(view.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        yield Finding("the file", "", "valid", f"it is no valid ONNX graph ({reason})", "export it again")


def opset(view: View, profile: Profile) -> Iterator[Finding]:
    """The operators are of a version that the reader knows."""
    written = graph.opset(view.model)
    if written > profile.max_opset:
        what = "mis-reads newer operators without a word" if profile.tensorrt else "refuses newer ones"
        yield Finding(
            "the file",
            "",
            "opset",
            f"opset {written}, and {profile.reader} reads up to {profile.max_opset} and {what}",
            f"export it with --profile {profile.name}",
        )


def ir(view: View, profile: Profile) -> Iterator[Finding]:
    """The file format is of a version that the reader knows."""
    if view.model.ir_version > profile.max_ir:
        written = view.model.ir_version
        message = f"ONNX IR version {written}, and {profile.reader} reads up to {profile.max_ir}"
        yield Finding("the file", "", "ir", message, f"export it with --profile {profile.name}")


def one_file(view: View, profile: Profile) -> Iterator[Finding]:
    """The weights are in the file that is hashed and copied."""
    outside = [t.name for t in view.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    outside += [name for p in view.model.metadata_props if p.key == graph.EXTERNAL for name in p.value.split()]
    if outside:
        message = f"{len(outside)} weights are kept in other files, which checksums and copies miss"
        yield Finding(outside[0], "", "one-file", message, "save it with its weights inside", "warning")


def static_shapes(view: View, profile: Profile) -> Iterator[Finding]:
    """Shapes are fixed where the profile wants them fixed."""
    if profile.dynamic_batch:
        return
    for info in view.model.graph.input:
        if info.name not in view.initializers and info.name not in view.shapes:
            yield Finding(info.name, "", "static-shapes", "its shape is not fixed", "export it with --batch N")


def types(view: View, profile: Profile) -> Iterator[Finding]:
    """Tensors are of types that the reader has."""
    if profile.types is None:
        return
    graph_ = view.inferred.graph
    found = {t.name: t.data_type for t in graph_.initializer}
    found |= {i.name: i.type.tensor_type.elem_type for i in (*graph_.input, *graph_.output, *graph_.value_info)}
    found |= {n.output[0]: a.t.data_type for n in view.nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    found |= {n.output[0]: a.i for n in view.nodes if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    for name, kind in found.items():
        label = TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else str(kind)
        if kind and label not in profile.types:
            node = view.producer.get(name)
            where, operator = (view.name(node), node.op_type) if node else (name, "")
            remedy = REMEDY_OF_TYPE.get(label, "convert it to FP32 before exporting")
            yield Finding(where, operator, "types", f"{profile.reader} has no {label} tensors", remedy)


# Rules about operators


def operators(view: View, profile: Profile) -> Iterator[Finding]:
    """Every operator has an importer in the reader."""
    local = {(f.domain, f.name) for f in view.model.functions}
    known = profile.importers()
    for node in view.nodes:
        if node.domain not in graph.STANDARD:
            if (node.domain, node.op_type) in local and (profile.tensorrt is None or profile.tensorrt >= (10, 0)):
                continue
            if node.domain.startswith("com.microsoft") and profile.tensorrt is None:
                continue
            message = f"domain '{node.domain}' is not of the ONNX standard"
            yield _at(view, node, "operators", message, "never feed a graph that ONNX Runtime has optimised; export it again")
        elif known is not None and node.op_type not in known:
            remedy = REMEDY_OF_OPERATOR.get(node.op_type, "write the layer with operators it has, or keep it out of the network")
            yield _at(view, node, "operators", f"{profile.reader} has no importer for it", remedy)


def constant_operands(view: View, profile: Profile) -> Iterator[Finding]:
    """Operands that the importer reads while parsing are initializers, not results of other nodes."""
    if profile.tensorrt is None:
        return
    for node in view.nodes:
        for index, what in CONSTANT_OPERANDS.get(node.op_type, {}).items():
            name = node.input[index] if index < len(node.input) else ""
            if not name or view.constant(name) is not None:
                continue
            maker = view.producer.get(name)
            if what == "weight" and maker is not None and maker.op_type == "DequantizeLinear":
                continue  # quantised weights are read through it
            through = f" but the output of {maker.op_type} '{view.name(maker)}'" if maker else " but an input of the graph"
            remedy = "fold the Identity nodes" if maker and maker.op_type == "Identity" else "fold constants before exporting"
            yield _at(view, node, "constant-operands", f"its {what} '{name}' is no initializer{through}", remedy)


def reduced_axes(view: View, profile: Profile) -> Iterator[Finding]:
    """Reductions carry their axes where the reader looks for them: as an attribute before opset 18."""
    if profile.max_opset >= 18:
        return
    for node in view.nodes:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1 and node.input[1]:
            message = f"{profile.reader} does not look at the input '{node.input[1]}' and would reduce over ALL axes"
            yield _at(view, node, "reduced-axes", message, f"export at opset {profile.max_opset}, where axes are an attribute")


def quantisation(view: View, profile: Profile) -> Iterator[Finding]:
    """Q/DQ nodes are symmetric, of 8-bit integers, and only where the target computes in them."""
    if profile.tensorrt is None:
        return
    for node in view.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if "int8" not in profile.precisions:
            why = f"no INT8 here: {profile.refused.get('int8', 'not offered')}"
            yield _at(view, node, "quantisation", why, "export it with --precision fp16")
            return
        zero = view.values(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and zero.any():
            yield _at(view, node, "quantisation", "TensorRT takes zero points of 0 only", "calibrate with symmetric ranges")
        source = view.constant(node.input[0])
        if node.op_type == "DequantizeLinear" and source is not None and source.data_type == TensorProto.INT32:
            yield _at(view, node, "quantisation", "TensorRT has no INT32 biases", "quantise with QuantizeBias False")


def pooling(view: View, profile: Profile) -> Iterator[Finding]:
    """Pooling without dilation and without indices: no TensorRT importer takes either."""
    if profile.tensorrt is None:
        return
    for node in view.nodes:
        if node.op_type not in ("MaxPool", "AveragePool"):
            continue
        if len(node.output) > 1 and node.output[1]:
            yield _at(view, node, "pooling", "TensorRT has no indices output", "return_indices=False")
        if any(a.name == "dilations" and any(d != 1 for d in a.ints) for a in node.attribute):
            yield _at(view, node, "pooling", "TensorRT has no dilated pooling", "dilation=1")


def resizing(view: View, profile: Profile) -> Iterator[Finding]:
    """Resize by the nearest pixel or linearly: no TensorRT smooths while it shrinks, and before 8.5 none has a cubic one."""
    if profile.tensorrt is None:
        return
    for node in view.nodes:
        if node.op_type == "Resize" and any(a.name == "antialias" and a.i for a in node.attribute):
            yield _at(view, node, "resizing", "TensorRT has no antialiased resize", "antialias=False")
        if profile.tensorrt >= (8, 5):
            continue
        if node.op_type == "Resize" and any(a.name == "mode" and a.s == b"cubic" for a in node.attribute):
            yield _at(view, node, "resizing", f"{profile.reader} has no cubic resize", "mode='bilinear'")


def clip_bounds(view: View, profile: Profile) -> Iterator[Finding]:
    """Clip's bounds are FP32: TensorRT before 8.5 reads the bytes of any other type as if they were."""
    if profile.tensorrt is None or profile.tensorrt >= (8, 5):
        return
    for node in view.nodes:
        for name in node.input[1:] if node.op_type == "Clip" else ():
            bound = view.constant(name)
            if bound is not None and bound.data_type != TensorProto.FLOAT:
                kind = TensorProto.DataType.Name(bound.data_type)
                yield _at(
                    view, node, "clip-bounds", f"{profile.reader} reads the {kind} bound as FP32", "export in FP32, build with --fp16"
                )


# Rules about what is lost


def identities(view: View, profile: Profile) -> Iterator[Finding]:
    """No Identity nodes: they hide constants and cost a layer."""
    spare = [n for n in view.nodes if n.op_type == "Identity"]
    if spare:
        yield _at(view, spare[0], "identities", f"{len(spare)} Identity nodes are left", "fold them, as export does", "warning")


def folded_norms(view: View, profile: Profile) -> Iterator[Finding]:
    """No BatchNormalization behind a convolution that could carry it."""
    for node in view.nodes:
        source = view.producer.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if source is not None and source.op_type in ("Conv", "ConvTranspose") and view.uses[node.input[0]] == 1:
            yield _at(view, node, "folded-norms", f"it could be folded into '{view.name(source)}'", "export in eval mode", "warning")


def widths(view: View, profile: Profile) -> Iterator[Finding]:
    """Channel counts are multiples of what the target computes at once; the rest is padding it pays for."""
    odd = {}
    for node in view.nodes:
        weight = view.weight(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None and len(weight.dims) > 2 and weight.dims[0] % profile.round_to:
            odd[view.name(node)] = weight.dims[0]
    if odd:
        first = next(iter(odd))
        message = f"{len(odd)} convolutions have widths that are no multiple of {profile.round_to} (first: {odd[first]})"
        yield Finding(first, "Conv", "widths", message, f"prune with --round-to {profile.round_to}", "warning")


RULES: tuple[Rule, ...] = (
    valid,
    opset,
    ir,
    one_file,
    static_shapes,
    types,
    operators,
    constant_operands,
    reduced_axes,
    quantisation,
    pooling,
    resizing,
    clip_bounds,
    identities,
    folded_norms,
    widths,
)

# Which operands `is_weights()` is asserted of, in release/8.2-GA and still in release/10.0-GA for biases and axes.
CONSTANT_OPERANDS: dict[str, dict[int, str]] = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "InstanceNormalization": {1: "scale", 2: "bias"},
    "ReduceSum": {1: "axes"},
    "Squeeze": {1: "axes"},
    "Unsqueeze": {1: "axes"},
    "CumSum": {1: "axis"},
    "TopK": {1: "K"},
    "Resize": {2: "scales"},
}
REMEDY_OF_OPERATOR = {
    "HardSwish": "export at opset 13, which writes x * HardSigmoid(x)",
    "Gelu": "export at an opset before 20, which writes it with Erf",
    "LayerNormalization": "export with this profile, which writes it with ReduceMean and Sqrt",
    "GroupNormalization": "export with this profile, which writes it with InstanceNormalization",
    "Mish": "export at an opset before 18, which writes x * Tanh(Softplus(x))",
}
REMEDY_OF_TYPE = {
    "DOUBLE": "make the network and its constants float32",
    "UINT8": "export without --uint8-input and normalise on the host",
    "BFLOAT16": "export it in FP32",
}


def _at(view: View, node: NodeProto, rule: str, message: str, remedy: str, severity: Literal["error", "warning"] = "error") -> Finding:
    return Finding(view.name(node), node.op_type, rule, message, remedy, severity)
