"""From a torch network to an ONNX graph, written for one profile and checked after writing, not when asking.

The exporters cannot be trusted with the request: asked for opset 13, torch's newer one logs a failure and writes 18.
So what counts is what the graph says. Weights stay inside the file, BN is folded, no Identity node is left (torch
shares equal constants through them, and TensorRT 8.2 rejects a convolution whose bias is one), and nothing of the
exporting machine (stack traces, paths) travels along."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxslim
import torch
from onnx import ModelProto, StringStringEntryProto
from torch import Tensor, nn
from torch.nn import functional as F

import prunectl
from prunectl.errors import UsageError, VerificationFailed
from prunectl.export import graph, lint, quantize
from prunectl.export.artifact import Artifact, InputSpec, Provenance, write_record, writing
from prunectl.export.profiles import Profile
from prunectl.files import atomic

OUTPUT = "logits"
LARGEST = 2**31 - 1  # bytes of a protobuf message; beyond it weights need files of their own, and hashes and copies break


def build(module: nn.Module, spec: InputSpec, profile: Profile, *, batch: int | None = 1) -> ModelProto:
    """The network in eval mode as a clean FP32 graph: normalised float32 (N, C, H, W) -> (N, classes) `logits`.

    batch: images a call, None for a free number. The module is left as it was. Raises UsageError if the profile takes
    no free batch or the exporter cannot write the network, VerificationFailed if what it wrote is not what was asked."""
    profile.check_batch(batch)
    twin = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    if (size := sum(4 * p.numel() for p in twin.parameters())) > LARGEST:
        raise UsageError(f"the network has {size / 2**30:.1f} GiB of weights; an ONNX file in one piece holds less than 2 GiB")
    images = torch.zeros(batch or 2, *spec.shape)  # 2, not 1: the exporters take a dimension of 1 for a constant
    write = _by_torchscript if profile.exporter == "torchscript" else _by_dynamo
    with _quiet(), _without_fast_path():
        try:
            raw = write(twin, images, spec, profile, batch is None)
        except (RuntimeError, TypeError, ValueError, AssertionError) as problem:
            raise UsageError(
                f"torch's {profile.exporter} exporter cannot write this network for profile {profile.name}: {_reason(problem)}"
            ) from problem
        model = _tidy(raw)
    _check(model, spec, profile, batch)
    return model


def lowered(model: ModelProto, spec: InputSpec, profile: Profile, precision: str, calibration: Iterable[Any] = ()) -> ModelProto:
    """The graph with whatever `precision` puts into it, and the normalisation of pixels if `spec.dtype` is uint8.

    calibration: batches of normalised float32 (N, C, H, W), for int8. Raises UsageError if the profile refuses it."""
    profile.check_precision(precision)
    inside = profile.graph_precision(precision)
    if inside == "int8":
        quantised = quantize.for_cpu if profile.tensorrt is None else quantize.for_tensorrt
        model = quantised(model, calibration)
    elif inside == "fp16":
        model = quantize.to_fp16(model)
    return graph.with_pixel_input(model, spec.mean, spec.std) if spec.dtype == "uint8" else model


def save(
    model: ModelProto,
    path: Path,
    *,
    spec: InputSpec,
    profile: Profile,
    precision: str = "fp32",
    provenance: Provenance | None = None,
    measured: Mapping[str, float] | None = None,
) -> Artifact:
    """The record of `model` written to `path` with its metadata, and to the JSON beside it: both whole, or nothing.

    measured: max_abs_diff, top1_agreement, accuracy of the record. Raises VerificationFailed with the lint's findings
    if the profile's reader would refuse or mis-read the file, UsageError if it cannot be written."""
    profile.check_precision(precision)
    lint.require_clean(lint.lint(model, profile), profile)
    provenance = provenance or Provenance()
    labels = {
        **spec.to_metadata(),
        "profile": profile.name,
        "precision": precision,
        "run": provenance.run,
        "pruning": json.dumps(dict(provenance.pruning)),
    }
    labelled = _labelled(model, labels)
    counted = graph.cost(labelled)
    data = labelled.SerializeToString(deterministic=True)
    record = Artifact(
        file=path.name,
        kind="onnx",
        profile=profile.name,
        precision=precision,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        opset=graph.opset(labelled),
        ir=labelled.ir_version,
        batch=graph.static_batch(labelled),
        params=counted.params,
        kernel_params=counted.kernel_params,
        macs=counted.macs,
        input=spec,
        engine_flags=profile.engine_flags(precision),
        provenance=provenance,
        **(measured or {}),
    )
    with writing(path), atomic(path) as draft:
        draft.write_bytes(data)
        write_record(path, record)  # now: only the renaming is left, and a record beside an older file is noticed on reading
    return record


def _by_torchscript(module: nn.Module, images: Tensor, spec: InputSpec, profile: Profile, free: bool) -> ModelProto:
    written = io.BytesIO()
    importers = profile.importers()
    spelled: list[Callable[..., Tensor]] = [_scaled_dot_product_attention]
    if importers is not None and "LayerNormalization" not in importers:
        spelled.append(_layer_norm)
    with _spelled_out(*spelled):
        torch.onnx.export(
            module,
            (images,),
            written,  # type: ignore[arg-type]  # a file object is taken, and documented, by this exporter
            dynamo=False,
            opset_version=profile.opset,
            input_names=[spec.name],
            output_names=[OUTPUT],
            dynamic_axes={spec.name: {0: "batch"}, OUTPUT: {0: "batch"}} if free else None,
        )
    return onnx.load_from_string(written.getvalue())


def _by_dynamo(module: nn.Module, images: Tensor, spec: InputSpec, profile: Profile, free: bool) -> ModelProto:
    program = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        opset_version=profile.opset,
        input_names=[spec.name],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},) if free else None,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _tidy(model: ModelProto) -> ModelProto:
    """Constants folded and Identity nodes gone; names of the exporting machine's files too.

    onnxslim's fusions stay off: they turn MatMul + Add into Gemm between two Reshape, which no target gains from, and
    take most of its time."""
    slim = onnxslim.slim(model, skip_optimizations=["graph_fusion"])
    assert slim is not None
    clean = graph.without_identities(slim)
    used = {node.domain for node in graph.View(clean).nodes}
    imports = [o for o in clean.opset_import if o.domain in (*graph.STANDARD, *used)]
    del clean.opset_import[:]
    clean.opset_import.extend(imports)
    for item in (clean.graph, *clean.graph.node, *clean.graph.value_info, *clean.graph.input, *clean.graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    clean.ClearField("metadata_props")
    clean.producer_name, clean.producer_version = "prunectl", prunectl.__version__
    return clean


def _check(model: ModelProto, spec: InputSpec, profile: Profile, batch: int | None) -> None:
    """The written graph against the request. Raises VerificationFailed."""
    if (written := graph.opset(model)) != profile.opset:
        raise VerificationFailed(
            f"profile {profile.name} asked for opset {profile.opset} and torch's {profile.exporter} exporter wrote {written}; "
            f"another torch version may do better"
        )
    expected = {spec.name: (batch, *spec.shape), OUTPUT: (batch, len(spec.classes))}
    for info in (*model.graph.input, *model.graph.output):
        dims = info.type.tensor_type.shape.dim
        got = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        if info.name not in expected or got != expected[info.name]:
            raise VerificationFailed(
                f"the exported graph has {info.name} {got}; expected {' and '.join(f'{n} {s}' for n, s in expected.items())}"
            )


def _labelled(model: ModelProto, labels: Mapping[str, str]) -> ModelProto:
    out = ModelProto()
    out.CopyFrom(model)
    del out.metadata_props[:]
    out.metadata_props.extend(StringStringEntryProto(key=key, value=value) for key, value in labels.items())
    return out


def _reason(problem: BaseException) -> str:
    """The first line that says what went wrong; torch wraps it in pages of advice."""
    text = str(problem.__cause__ or problem).strip() or type(problem).__name__
    return text.splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters say much on every stream; what matters reaches the caller as an exception.

    Standard output is silenced at the file descriptor: a failing TorchScript export prints whole graphs there from C++."""
    disabled = logging.root.manager.disable
    sys.stdout.flush()
    stdout = os.dup(1)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            logging.disable(disabled)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's fused attention layers have no ONNX form."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _spelled_out(*functions: Callable[..., Tensor]) -> Iterator[None]:
    """Functions of torch.nn.functional replaced by those of the same name (less the underscore) given here.

    For readers without an operator for them. Inside torch's own attention layer no other hook reaches these calls."""
    names = [function.__name__.removeprefix("_") for function in functions]
    originals = [getattr(F, name) for name in names]
    for name, function in zip(names, functions, strict=True):
        setattr(F, name, function)
    try:
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(F, name, original)


def _scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as in torch's reference, without dropout; masks add, or hide where they are False."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


def _layer_norm(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(axes, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
