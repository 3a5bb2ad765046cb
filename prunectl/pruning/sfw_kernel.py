"""The streamed step of sfw_stream.py in C, for contiguous float32 tensors: SFW(..., kernel="compiled").

The C source beside this file is built once a process by the machine's own compiler (`CC`, else `cc`), for its own processor,
in a temporary folder that is gone after loading. Exact support: results differ from the uncompiled step by
rounding only, and do not depend on the number of threads, `torch.get_num_threads()`."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from prunectl.errors import UsageError
from prunectl.pruning.constraints import KSparse, KSupport
from prunectl.pruning.sfw_stream import Job

SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O2", "-march=native", "-fno-trapping-math", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_SCRATCH = 3 << 13  # floats a thread, at least: SAMPLE + SAMPLE / 2 of the C file, or its five arrays of a stretch of groups
_SIGNS, _VALUES, _PATTERN = 0, 1, 2
_GRADIENT, _FIXED = 0, 1
_NOWHERE = 1, 0  # a bracket that nothing lies in: select from all


class _Task(ctypes.Structure):
    _fields_ = (
        ("w", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("keep", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("stride", ctypes.c_int64),
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
    takes = job.w.dtype == torch.float32 and job.w.is_contiguous()
    return takes and (job.groups is None or 5 * job.groups.m * job.groups.stride <= _SCRATCH)


def run_(jobs: Sequence[Job]) -> int:
    """Every job's w and m moved by one step, in place; the number of steps that were clamped at their vertex."""
    jobs = sorted(jobs, key=lambda job: -job.w.numel())
    tasks = (_Task * len(jobs))(*map(_task, jobs))
    threads = torch.get_num_threads()  # never fewer: OpenMP would end torch's other threads and torch start them again
    room = max(_SCRATCH, jobs[0].w.numel() // 8)
    scratch = torch.empty(threads * room)
    library().sfw_steps(tasks, len(jobs), scratch.data_ptr(), room, threads)
    for job, task in zip(jobs, tasks, strict=True):
        if job.bracket:
            job.bracket.saw(task.kth, torch.float32)
    return sum(task.gamma > 1 for task in tasks)


def _task(job: Job) -> _Task:
    low, high = job.bracket.guess or _NOWHERE if job.bracket else _NOWHERE
    size, constraint = job.w.numel(), job.constraint
    if job.groups:
        keep, group, stride, vertex = *job.groups, _PATTERN
    else:
        assert isinstance(constraint, KSparse | KSupport)
        keep, group, stride, vertex = min(constraint.k, size), size, 1, _SIGNS if isinstance(constraint, KSparse) else _VALUES
    return _Task(
        *(job.w.data_ptr(), job.m.data_ptr(), job.g.data_ptr()),
        *(size, keep, group, stride, vertex),
        _GRADIENT if job.rescaled else _FIXED,
        *(job.weight, low, high),
        *(constraint.radius, job.length),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises UsageError if there is no working C compiler."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sfw_kernel.so"
        try:
            subprocess.run([*compiler, *_FLAGS, str(SOURCE), "-o", str(target), "-lm"], check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(str(target))
        except FileNotFoundError:
            raise UsageError(f"SFW kernel: no C compiler '{compiler[0]}'; install one, set CC, or leave the kernel out.") from None
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip() or f"exit {error.returncode}").splitlines()[-1]
            raise UsageError(f"SFW kernel: '{compiler[0]}' failed: {said}; leave the kernel out.") from None
        except OSError as error:
            raise UsageError(f"SFW kernel: what '{compiler[0]}' made cannot be used: {error}; leave the kernel out.") from None
    loaded.sfw_steps.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    loaded.sfw_steps.restype = None
    return loaded
