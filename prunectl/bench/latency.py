"""Times calls on this machine: windows of back-to-back inferences or optimizer steps, each with its own stamp.

The loop holds nothing but the call and the clock. Threads are fixed in number and bound to cores while it runs."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.bench.records import OnnxModel, TrainModel, Window
from prunectl.errors import UsageError

Mark = Callable[[], None]


def cores_for(threads: int | None) -> list[int]:
    """The first `threads` of the cores that this process may use. Raises UsageError if it may not use so many."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None and threads > len(allowed):
        raise UsageError(f"bench threads = {threads}: this process may use {len(allowed)} cores.")
    return allowed[: threads or len(allowed)]


@contextlib.contextmanager
def pinned(threads: int | None) -> Iterator[list[int]]:
    """The cores that all threads of this process, old and new, may use meanwhile: `cores_for(threads)`."""
    allowed, cores = os.sched_getaffinity(0), cores_for(threads)
    before = torch.get_num_threads()
    _bind(cores)
    torch.set_num_threads(len(cores))
    try:
        yield cores
    finally:
        _bind(allowed)
        torch.set_num_threads(before)


def _bind(cores: Iterable[int]) -> None:
    """Binds every thread that there is: those that torch keeps from before, and those started since."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """The garbage collector leaves alone what lives already: a look at all of torch takes a third of a second, in a window or before it."""
    gc.collect()
    if gc.get_freeze_count():  # our caller has done so, and keeps it so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def load_window(
    call: Callable[[], object], *, artifact: int, repeat: int, warmup_s: float, duration_s: float, iterations: int, mark: Mark
) -> Window:
    """A window of calls after a warm-up: at least duration_s long and `iterations` many. latency_ns: from stamp to stamp.

    mark is called just outside both edges, for a sensor that is read there."""
    _run_for(call, warmup_s, 1)
    return _window("load", artifact, repeat, lambda: _run_for(call, duration_s, iterations), mark)


def train_window(step: Callable[[], object], *, artifact: int, repeat: int, steps: int, warmup_steps: int, mark: Mark) -> Window:
    """A window of exactly `steps` optimizer steps after the warm-up."""
    _run_for(step, 0.0, warmup_steps)
    return _window("train", artifact, repeat, lambda: _run_for(step, 0.0, steps), mark)


def idle_window(seconds: float, *, mark: Mark) -> Window:
    mark()
    start = time.monotonic_ns()
    time.sleep(seconds)
    end = time.monotonic_ns()
    mark()
    return Window("idle", None, 0, start, end)


def _window(kind: str, artifact: int, repeat: int, run: Callable[[], list[int]], mark: Mark) -> Window:
    gc.collect()
    mark()
    before = _waited_ns()
    stamps = np.array(run(), dtype=np.int64)
    after = _waited_ns()
    mark()
    start, end = int(stamps[0]), int(stamps[-1])
    waited = {} if before is None or after is None else {"waited_share": (after - before) / max(1, end - start)}
    return Window(kind, artifact, repeat, start, end, tuple(np.diff(stamps).tolist()), details=waited)


def _waited_ns() -> int | None:
    """How long this thread has been ready and without a core so far, by the kernel's account; None where it keeps none."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _run_for(call: Callable[[], object], seconds: float, at_least: int) -> list[int]:
    """Stamps before the first call and after each."""
    stamps = [time.monotonic_ns()]
    end = stamps[0] + int(seconds * 1e9)
    while len(stamps) <= at_least or stamps[-1] < end:
        call()
        stamps.append(time.monotonic_ns())
    return stamps


def onnx_session(model: OnnxModel, providers: list[Any], *, threads: int) -> Any:
    """An ONNX Runtime session with a fixed number of threads. Raises UsageError for a file it cannot load."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model.path), options, providers=providers)
    except (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument, state.NoSuchFile, state.NotImplemented) as error:
        raise UsageError(f"{model.path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from None


FED: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}  # what an image may be, by ONNX Runtime's words


def synthetic_input(session: Any, batch: int) -> dict[str, np.ndarray]:
    """One fixed random batch for every input of the session; an open first dimension becomes `batch`. Not zeros: they draw less power."""
    rng = np.random.default_rng(0)
    feed = {}
    for node in session.get_inputs():
        shape = [batch if i == 0 and not isinstance(size, int) else size for i, size in enumerate(node.shape)]
        if not all(isinstance(size, int) for size in shape):
            raise UsageError(f"input {node.name} has the open shape {node.shape}: export the model with a fixed image size.")
        if node.type not in FED:
            raise UsageError(f"input {node.name} takes {node.type}: expected images, as one of {', '.join(FED)}.")
        numbers = rng.standard_normal(shape) if "float" in node.type or "double" in node.type else rng.integers(0, 128, shape)
        feed[node.name] = numbers.astype(FED[node.type])
    return feed


def batch_of(session: Any, batch: int) -> int:
    """Images in one inference: what the file fixes, else `batch`."""
    first = session.get_inputs()[0].shape[0]
    return first if isinstance(first, int) else batch


def optimizer_step(task: TrainModel, device: torch.device) -> Callable[[], object]:
    """One SGD step of a copy of the module on one fixed synthetic batch, finished when the call returns."""
    module = copy.deepcopy(task.module).to(device).train()
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(task.input_shape, generator=generator).to(device)
    y = torch.randint(task.num_classes, (task.input_shape[0],), generator=generator).to(device)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step
