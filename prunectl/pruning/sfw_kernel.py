"""The streamed step of sfw_stream.py in C, for contiguous float32 tensors: SFW(..., kernel="compiled").

The C source beside this file is built once a process by the machine's own compiler (`CC`, else `cc`), for its own processor,
in a temporary folder that is gone after loading. Exact support, sums in double: results differ from the uncompiled step by
rounding only. Tensors are shared out to `torch.get_num_threads()` threads whole, so results do not
depend on their number."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from prunectl.errors import UsageError
from prunectl.pruning.constraints import KSparse
from prunectl.pruning.sfw_stream import Job

SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O2", "-march=native", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd", "-shared", "-fPIC")
_LEAST_SCRATCH = 3 << 13  # floats
_SIGNS, _VALUES = 0, 1
_GRADIENT, _FIXED = 0, 1


class _Task(ctypes.Structure):
    _fields_ = (
        ("w", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("vertex", ctypes.c_int32),
        ("rescale", ctypes.c_int32),
        ("weight", ctypes.c_float),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("radius", ctypes.c_double),
        ("length", ctypes.c_double),
        ("kth", ctypes.c_int32),
        ("gamma", ctypes.c_double),
    )


def fits(job: Job) -> bool:
    """Whether the compiled step can take this tensor."""
    return job.w.dtype == torch.float32 and job.w.is_contiguous()


def run_(jobs: Sequence[Job]) -> int:
    """Every job's w and m moved by one step, in place; the number of steps that were clamped at their vertex."""
    shares = _shared_out(jobs, torch.get_num_threads())
    if len(shares) == 1:
        return _run_share(shares[0])
    return sum(_threads(len(shares)).map(_run_share, shares))


def _run_share(jobs: Sequence[Job]) -> int:
    tasks = (_Task * len(jobs))(*map(_task, jobs))
    scratch = torch.empty(max(_LEAST_SCRATCH, max(job.w.numel() for job in jobs) // 8))
    library().sfw_steps(tasks, len(jobs), scratch.data_ptr(), scratch.numel())
    for job, task in zip(jobs, tasks, strict=True):
        job.bracket.saw(task.kth, torch.float32)
    return sum(task.gamma > 1 for task in tasks)


def _task(job: Job) -> _Task:
    low, high = job.bracket.guess or (1, 0)  # nothing lies in [1, 0]: select from all
    size = job.w.numel()
    return _Task(
        job.w.data_ptr(),
        job.m.data_ptr(),
        job.g.data_ptr(),
        size,
        min(job.constraint.k, size),
        _SIGNS if isinstance(job.constraint, KSparse) else _VALUES,
        _GRADIENT if job.rescaled else _FIXED,
        job.weight,
        low,
        high,
        job.constraint.radius,
        job.length,
    )


def _shared_out(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """The jobs in at most `workers` lists of about equal work: largest first, always to the lightest list."""
    shares: list[list[Job]] = [[] for _ in range(max(1, min(workers, len(jobs))))]
    loads = [0] * len(shares)
    for job in sorted(jobs, key=lambda job: -job.w.numel()):
        lightest = loads.index(min(loads))
        shares[lightest].append(job)
        loads[lightest] += job.w.numel()
    return shares


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="sfw")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises UsageError if there is no working C compiler."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sfw_kernel.so"
        try:
            subprocess.run([*compiler, *_FLAGS, str(SOURCE), "-o", str(target), "-lm"], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UsageError(f"SFW kernel: no C compiler '{compiler[0]}'; install one, set CC, or leave the kernel out.") from None
        except subprocess.CalledProcessError as error:
            raise UsageError(
                f"SFW kernel: '{compiler[0]}' failed: {error.stderr.strip().splitlines()[-1]}; leave the kernel out."
            ) from None
        loaded = ctypes.CDLL(str(target))
    loaded.sfw_steps.argtypes, loaded.sfw_steps.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64), None
    return loaded
