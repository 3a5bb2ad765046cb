"""Export profiles: what one target reads, and how a graph is written for it.

One graph per target, never one graph for all: TensorRT 8.2 does not refuse a newer opset but mis-reads it, and from
TensorRT 11 on the precision lives in the graph alone. A profile is data; no code asks for a profile by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from prunectl.errors import UsageError
from prunectl.registry import Registry

profiles = Registry("profile", "export/profiles.py")

DATA = Path(__file__).parent / "data"
BASIC_TYPES = frozenset({"FLOAT", "FLOAT16", "INT8", "INT32", "INT64", "BOOL"})


@dataclass(frozen=True)
class Profile:
    """How a network is written for one target, and what that target reads.

    opset: what we write; max_opset, max_ir: the newest that the target reads. fp16: whether FP16 is a cast in the
    graph or a flag of the engine build. sparsity: patterns of zeros that the target skips. round_to: the lint tells of
    widths that are no multiple. tensorrt: the oldest TensorRT served, None for ONNX Runtime. operators: the file in data/ that
    lists its importers. types: the tensor types it reads, None for all. ahead_of_time: its engines are compiled without
    its GPU. board: they are built on a Jetson, as a desktop's GPU makes none for it. refused: precision -> why it is not offered."""

    name: str
    opset: int
    max_opset: int
    max_ir: int
    exporter: Literal["torchscript", "dynamo"]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    fp16: Literal["graph", "flag"] = "graph"
    sparsity: tuple[str, ...] = ()
    round_to: int = 8
    dynamic_batch: bool = True
    tensorrt: tuple[int, int] | None = None
    operators: str | None = None
    types: frozenset[str] | None = None
    ahead_of_time: bool = False
    board: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def reader(self) -> str:
        """The oldest program that reads this profile's files."""
        return f"TensorRT {self.tensorrt[0]}.{self.tensorrt[1]}" if self.tensorrt else "ONNX Runtime 1.18"

    def importers(self) -> frozenset[str] | None:
        """The operators that the target imports; None if it reads every standard operator."""
        return _importers(self.operators) if self.operators else None

    def graph_precision(self, precision: str) -> str:
        """What the graph itself computes in: fp32 where FP16 is a flag of the engine build."""
        return "fp32" if precision == "fp16" and self.fp16 == "flag" else precision

    def engine_flags(self, precision: str) -> tuple[str, ...]:
        """What an engine build must be asked for besides, as in trtexec's --fp16 and --int8."""
        if self.fp16 == "graph":
            return ()
        return {"fp32": (), "fp16": ("fp16",), "int8": ("int8", "fp16")}[precision]

    def check_precision(self, precision: str) -> None:
        """Raises UsageError with the reason if the target does not run `precision`."""
        if precision not in self.precisions:
            why = self.refused.get(precision, "it is not one of its precisions")
            raise UsageError(f"precision {precision} with profile {self.name}: {why}; use {' or '.join(self.precisions)}")

    def check_batch(self, batch: int | None) -> None:
        """Raises UsageError if the target takes no free batch (None), or if there is no such number of images."""
        if batch is None and not self.dynamic_batch:
            raise UsageError(f"a dynamic batch with profile {self.name}: it takes static shapes only; use --batch N")
        if batch is not None and batch < 1:
            raise UsageError(f"batch {batch}: must be at least 1")

    def check_sparsity(self, pattern: str) -> None:
        """Raises UsageError if zeros in `pattern` (such as `2:4`) save the target no work."""
        if pattern not in self.sparsity:
            gains = [name for name in profiles.names() if pattern in load(name).sparsity]
            remedy = f"add --profile {' or '.join(gains)}, which skip them" if gains else "no target skips them; 2:4 is what hardware knows"
            raise UsageError(f"sparsity {pattern} with profile {self.name}: it multiplies by every zero; {remedy}")


def load(name: str) -> Profile:
    """The profile called `name`. Raises UnknownName."""
    profile: Profile = profiles.get(name)()
    return profile


@lru_cache
def _importers(file: str) -> frozenset[str]:
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


@profiles.register
def cpu() -> Profile:
    """ONNX Runtime on a CPU: opset 18; INT8 by Q/DQ; no pattern of zeros gives speed."""
    return Profile("cpu", opset=18, max_opset=21, max_ir=10, exporter="dynamo")


@profiles.register
def gpu() -> Profile:
    """TensorRT 10 to 11 on a desktop or server GPU: opset 18; FP16 and INT8 live in the graph; 2:4 sparsity."""
    return _tensorrt10("gpu")


@profiles.register
def rtx() -> Profile:
    """TensorRT for RTX, compiled ahead of time without a GPU: opset 18; FP16 and INT8 live in the graph; 2:4 sparsity."""
    return replace(_tensorrt10("rtx"), ahead_of_time=True)


@profiles.register
def orin() -> Profile:
    """Jetson Orin, TensorRT 8.5 to 10 (JetPack 5 and 6): opset 17; FP16 by flag, INT8 by Q/DQ; 2:4 sparsity."""
    return Profile(
        "orin",
        opset=17,
        max_opset=17,
        max_ir=8,
        exporter="torchscript",
        fp16="flag",
        sparsity=("2:4",),
        tensorrt=(8, 5),
        operators="trt85_ops.txt",
        types=BASIC_TYPES | {"UINT8"},
        board=True,
    )


@profiles.register
def tx2() -> Profile:
    """Jetson TX2, TensorRT 8.2 (JetPack 4.6): opset 13, static shapes; FP16 by flag; neither INT8 nor sparse tensor cores."""
    return Profile(
        "tx2",
        opset=13,
        max_opset=13,
        max_ir=8,
        exporter="torchscript",
        precisions=("fp32", "fp16"),
        fp16="flag",
        dynamic_batch=False,
        tensorrt=(8, 2),
        operators="trt82_ops.txt",
        types=BASIC_TYPES,
        board=True,
        refused={"int8": "its GPU (sm_62, Pascal) has no INT8 instructions"},
    )


def _tensorrt10(name: str) -> Profile:
    return Profile(
        name,
        opset=18,
        max_opset=20,
        max_ir=10,
        exporter="dynamo",
        sparsity=("2:4",),
        tensorrt=(10, 0),
        operators="trt100_ops.txt",
        types=BASIC_TYPES | {"UINT8", "BFLOAT16", "FLOAT8E4M3FN", "INT4"},
    )
