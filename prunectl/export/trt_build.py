"""The TensorRT process: reads one job from stdin, builds or parses, writes one JSON result to the job's `result` file.

Run as `python -m prunectl.export.trt_build`, a process of its own because a compiler may crash or be killed for its
memory. TensorRT 8.x to 11 and TensorRT for RTX differ in what they have, so their API is asked for features and never
for its version. Every object stays referenced until the end: the parser points into the network, the network into the
builder, and a freed one is a crash."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Refused(Exception):
    """TensorRT says no. kind: `parse`, `build` or `precision`; findings: (node, operator, text) of the parser."""

    def __init__(self, kind: str, message: str, findings: list[tuple[str, str, str]] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.findings = findings or []


def work(trt: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the job asks of the TensorRT module `trt`. Raises Refused."""
    if job["action"] == "probe":
        return {"version": trt.__version__, "builder": hasattr(trt, "Builder")}
    said: list[str] = []
    logger = _logger(trt, said)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, in_graph=job["in_graph"]))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        findings = [_finding(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Refused("parse", findings[0][2] if findings else _last(said), findings)
    if job["action"] == "parse":
        return {"layers": network.num_layers}
    config = builder.create_builder_config()
    flags = configure(trt, builder, network, config, job)
    begin = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused("build", _last(said))
    Path(job["engine"]).write_bytes(engine)
    return {"flags": flags, "build_s": time.monotonic() - begin, "layers": network.num_layers}


def network_flags(trt: Any, *, in_graph: bool) -> int:
    """Bits of `create_network`: explicit batch where it still must be asked for, strong types where the graph decides."""
    kinds = trt.NetworkDefinitionCreationFlag
    bits = 0
    if hasattr(kinds, "EXPLICIT_BATCH"):  # demanded by 8.x, ignored by 10, gone later
        bits |= 1 << int(kinds.EXPLICIT_BATCH)
    if in_graph and hasattr(kinds, "STRONGLY_TYPED"):
        bits |= 1 << int(kinds.STRONGLY_TYPED)
    return bits


def configure(trt: Any, builder: Any, network: Any, config: Any, job: Mapping[str, Any]) -> list[str]:
    """Sets workspace, precision, sparsity, target GPUs and the range of a free batch; the names of the flags it set."""
    workspace = job["workspace_mb"] << 20
    if hasattr(config, "set_memory_pool_limit"):  # since 8.4
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    else:
        config.max_workspace_size = workspace
    flags = precision_flags(trt, job["precision"], in_graph=job["in_graph"])
    if job["sparse"]:
        flags.append("SPARSE_WEIGHTS")
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for i, capability in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    ranges = builder.create_optimization_profile()
    free = [t for t in map(network.get_input, range(network.num_inputs)) if -1 in tuple(t.shape)]
    for tensor in free:
        low, best, high = ((n, *tuple(tensor.shape)[1:]) for n in (1, job["batch"], job["batch"]))
        ranges.set_shape(tensor.name, low, best, high)
    if free:
        config.add_optimization_profile(ranges)
    return flags


def precision_flags(trt: Any, precision: str, *, in_graph: bool) -> list[str]:
    """Builder flags for `precision`: none where the types of the graph decide. Raises Refused if there is no such flag."""
    if in_graph and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return []
    wanted = {"fp32": [], "fp16": ["FP16"], "int8": ["INT8", "FP16"]}[precision]
    missing = [flag for flag in wanted if not hasattr(trt.BuilderFlag, flag)]
    if missing:
        raise Refused("precision", f"this TensorRT has no {missing[0]} flag and takes precision from the graph alone")
    return wanted


def _logger(trt: Any, said: list[str]) -> Any:
    """A TensorRT logger that keeps errors in `said`; anything less stays unsaid."""

    def log(self: Any, severity: Any, message: str) -> None:
        if int(severity) <= int(trt.ILogger.Severity.ERROR):
            said.append(message)

    def init(self: Any) -> None:
        trt.ILogger.__init__(self)

    return type("Logger", (trt.ILogger,), {"__init__": init, "log": log})()


def _finding(error: Any) -> tuple[str, str, str]:
    """(node, operator, text) of a parser error; TensorRT before 9 knows the node's number only."""
    node = error.node_name() if hasattr(error, "node_name") else f"node {error.node()}"
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return node, operator, " ".join(error.desc().split())


def _last(said: list[str]) -> str:
    """The first error is the cause; what follows are its consequences."""
    return " ".join(said[0].split()) if said else "it gave no reason"


def _die_with_parent() -> None:
    """Linux ends this process with the one that started it, however that ends; an engine that nobody waits for holds the GPU for long."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    _die_with_parent()
    job = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"ok": work(importlib.import_module(job["backend"]), job)}
    except ImportError as problem:
        answer = {"kind": "missing", "message": str(problem)}
    except Refused as problem:
        answer = {"kind": problem.kind, "message": str(problem), "findings": problem.findings}
    Path(job["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
