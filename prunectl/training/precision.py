"""In which number format a network trains here, and in which memory layout: chosen by what the hardware is fast at."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prunectl import dist
from prunectl.errors import DeviceUnavailable, UsageError


@dataclass(frozen=True)
class Placement:
    """Device, autocast format (None for fp32) and memory layout of one run."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    channels_last: bool

    @property
    def name(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.autocast_dtype]

    def autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=True)

    def put(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model = model.to(self.device)
        for t in (*model.parameters(), *model.buffers()):
            if t.dim() == 4:
                t.data = t.data.contiguous(memory_format=layout)
        return model

    def images(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.device, non_blocking=True, memory_format=layout)


def place(device: str, precision: str) -> Placement:
    """The placement for `device` (auto, cpu, cuda, cuda:1) and `precision` (auto, fp32, bf16, fp16).

    auto precision is bf16 where it is fast: CPUs with AMX or AVX512-BF16, and CUDA devices that support it. On the CPU the process
    keeps the memory that it frees from here on."""
    target = dist.local_device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else _device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("--device cuda: this machine has no CUDA device that torch can use; take --device cpu")
    fast_bf16 = torch.cuda.is_bf16_supported() if target.type == "cuda" else _cpu_has_fast_bf16()
    name = ("bf16" if fast_bf16 else "fp32") if precision == "auto" else precision
    if name == "fp16" and target.type == "cpu":
        raise UsageError("--precision fp16 trains on CUDA only; on this device take bf16 or fp32")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if target.type == "cpu":
        _keep_freed_memory()
    return Placement(target, dtype, channels_last=dtype is not None or target.type == "cpu")


def _device(text: str) -> torch.device:
    try:
        device = dist.local_device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UsageError(f"--device {text}: expected auto, cpu, cuda or cuda:N")
    return device


def _keep_freed_memory() -> None:
    """Activations are as large in every step: given back to the system each time, their pages would be faulted in and zeroed again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries have none, or one that ignores this
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation outside it


def _cpu_has_fast_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("amx_bf16", "avx512_bf16"))
