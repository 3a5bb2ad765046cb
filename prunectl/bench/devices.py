"""Where a bench runs: each entry takes the same job and gives a RawBench.

`target` is what stands behind the colon or in --host: a GPU's number, a board's name, a file to replay. torch and ONNX Runtime
are imported by the entries that run something here; a board and a replay start without them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunectl.bench import board
from prunectl.bench.records import Artifact, Job, RawBench, Settings, TrainModel, Window
from prunectl.bench.sampling import GpuEnergyCounter, HostSampler, host_sampler
from prunectl.errors import DeviceUnavailable, UsageError
from prunectl.registry import Registry

Say = Callable[[str], None]
Call = Callable[[], object]
devices = Registry("device", "bench/devices.py")


def parse(spec: str) -> tuple[str, str | None]:
    """(name, target) of --device: cpu, cuda, cuda:1, jetson, jetson:USER@HOST, replay:FILE. Raises UnknownName."""
    name, _, target = spec.partition(":")
    return devices.check(name), target or None


@devices.register
def cpu(job: Job, settings: Settings, *, target: str | None = None, say: Say) -> RawBench:
    """this machine's CPU by ONNX Runtime (training: torch), power by RAPL where the machine has it"""
    import onnxruntime as ort
    import torch

    from prunectl.bench import latency

    with host_sampler(settings.period_ms) as sampler, latency.pinned(settings.threads) as cores:  # the sampler keeps all cores
        calls: list[Call] = []
        artifacts = []
        for model in job.models:
            session = latency.onnx_session(model, ["CPUExecutionProvider"], threads=len(cores))
            calls.append(functools.partial(session.run, None, latency.synthetic_input(session, model.batch)))
            about = {"runtime": "onnxruntime", "version": ort.__version__}
            artifacts.append(Artifact(model.name, "onnx", model.sha256, latency.batch_of(session, model.batch), model.precision, about))
        steps = [latency.optimizer_step(task, torch.device("cpu")) for task in job.train]
        windows = _interleave(job, calls, steps, settings, idle=sampler.has_power, mark=lambda: None, say=say)
        sampler.stop(settings.period_ms)
    return RawBench(
        device="cpu",
        simulated=False,
        artifacts=(*artifacts, *map(_module_artifact, job.train)),
        windows=windows,
        power=sampler.power,
        telemetry=sampler.telemetry,
        environment=_environment(sampler) | {"onnxruntime": ort.__version__, "threads": len(cores), "cores": tuple(cores)},
        settings=dataclasses.asdict(settings),
    )


@devices.register(name="cuda")
def cuda_gpu(job: Job, settings: Settings, *, target: str | None = None, say: Say) -> RawBench:
    """an NVIDIA GPU of this machine by TensorRT or ONNX Runtime, power by the GPU's energy counter (cuda:1 for the second)"""
    import torch

    from prunectl.bench import cuda, latency

    device = cuda.cuda_device(_gpu_index(target))
    counter = GpuEnergyCounter(device.index)
    with host_sampler(settings.period_ms) as sampler:
        calls: list[Call] = []
        artifacts = []
        for model in job.models:
            say(f"preparing {model.name}")
            call, batch, about = cuda.runner(model, settings, device)
            calls.append(call)
            artifacts.append(Artifact(model.name, "engine", model.sha256, batch, cuda.precision_of(model, settings), about))
        steps = [latency.optimizer_step(task, device) for task in job.train]
        windows = _interleave(job, calls, steps, settings, idle=counter.reason is None, mark=counter.mark, say=say)
        sampler.stop(settings.period_ms)
    return RawBench(
        device="cuda",
        simulated=False,
        artifacts=(*artifacts, *map(_module_artifact, job.train)),
        windows=windows,
        power=counter.power(),
        telemetry=sampler.telemetry,
        environment=_environment(sampler) | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda},
        settings=dataclasses.asdict(settings),
    )


@devices.register
def jetson(job: Job, settings: Settings, *, target: str | None = None, say: Say) -> RawBench:
    """a Jetson board: this machine if it is one, else --host USER@HOST or $PRUNECTL_JETSON over ssh"""
    return board.measure(job, settings, host=jetson_host(target), say=say)


@devices.register
def replay(job: Job, settings: Settings, *, target: str | None = None, say: Say) -> RawBench:
    """no device: the raw.json of an earlier bench, analysed again (replay:FILE)"""
    if target is None:
        raise UsageError("--device replay needs a file: replay:FILE, a raw-*.json in the folder bench/ of a run.")
    return RawBench.read(Path(target))


def check_present(name: str, target: str | None, settings: Settings) -> None:
    """Raises DeviceUnavailable or UsageError for a GPU or cores that are not here, before minutes are spent on files for them."""
    if name == "cpu":
        from prunectl.bench import latency

        if target is not None:
            raise UsageError(f"--device cpu:{target}: there is one CPU; say how many of its cores with --threads.")
        latency.cores_for(settings.threads)
    if name == "cuda":
        from prunectl.bench import cuda

        cuda.cuda_device(_gpu_index(target))


def jetson_host(named: str | None) -> str | None:
    """The board to ask over ssh: the one that was named, none if this machine is a Jetson, $PRUNECTL_JETSON. Raises DeviceUnavailable."""
    if named is not None:
        return named
    if Path("/etc/nv_tegra_release").exists():
        return None
    if host := os.environ.get("PRUNECTL_JETSON"):
        return host
    raise DeviceUnavailable("--device jetson: this machine is no Jetson; name one with --host USER@HOST or in $PRUNECTL_JETSON.")


def _environment(sampler: HostSampler) -> dict[str, Any]:
    return {**sampler.about["environment"], "torch": importlib.metadata.version("torch"), "platform": platform.platform()}


def _gpu_index(target: str | None) -> int:
    if target is not None and not target.isdecimal():
        raise UsageError(f"--device cuda:{target}: the part behind the colon is the number of a GPU, e.g. cuda:0.")
    return int(target or 0)


def _module_artifact(task: TrainModel) -> Artifact:
    parameters = sum(p.numel() for p in task.module.parameters())
    return Artifact(task.name, "module", None, task.input_shape[0], "fp32", {"params": parameters})


def _interleave(
    job: Job, calls: list[Call], steps: list[Call], settings: Settings, *, idle: bool, mark: Callable[[], None], say: Say
) -> tuple[Window, ...]:
    """Idle first; then every model in turn, `repeats` times over; then training the same way. Neighbours share temperature and clocks."""
    from prunectl.bench import latency

    windows = []
    if idle:
        say(f"idle baseline, {settings.idle_s:.0f} s")
        windows.append(latency.idle_window(settings.idle_s, mark=mark))
    span = {"warmup_s": settings.warmup_s, "duration_s": settings.duration_s}
    with latency.quiet_heap():
        for repeat in range(settings.repeats):
            for i, (model, call) in enumerate(zip(job.models, calls, strict=True)):
                say(f"{model.name}, repeat {repeat + 1} of {settings.repeats}")
                windows.append(latency.load_window(call, artifact=i, repeat=repeat, **span, iterations=settings.iterations, mark=mark))
        for repeat in range(settings.repeats):
            for i, (task, step) in enumerate(zip(job.train, steps, strict=True), len(calls)):
                say(f"training {task.name}, repeat {repeat + 1} of {settings.repeats}")
                counts = {"steps": task.steps, "warmup_steps": task.warmup_steps}
                windows.append(latency.train_window(step, artifact=i, repeat=repeat, **counts, mark=mark))
    return tuple(windows)
