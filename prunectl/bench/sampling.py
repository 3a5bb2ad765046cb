"""Power of this machine while something runs on it: the agent as a separate process, or a GPU's own energy counter."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prunectl.bench.board import agent_path
from prunectl.bench.records import Power, Rail, Telemetry
from prunectl.errors import DeviceUnavailable


@dataclass
class HostSampler:
    """A running `agent.py sample`: what it can read, and once it was stopped what it read."""

    process: subprocess.Popen[bytes]
    about: dict[str, Any]
    power: Power = field(default_factory=lambda: Power(None, "sampling has not ended"))
    telemetry: Telemetry = field(default_factory=Telemetry)

    @property
    def has_power(self) -> bool:
        return self.about["source"] is not None

    def stop(self, period_ms: float) -> None:
        """Ends the sampling and keeps what was sampled; of a sampler that was killed, the reason."""
        time.sleep(4 * period_ms / 1e3)  # samples on both sides of the last window
        try:
            seen = json.loads(self.process.communicate(timeout=30)[0])
        except (ValueError, subprocess.TimeoutExpired):  # what was timed meanwhile is worth keeping
            self.power = Power(None, "the sampler process died")
            return
        rails = tuple(Rail(**rail) for rail in self.about["rails"])
        values = {name: tuple(v) for name, v in seen["values"].items()}
        self.power = Power(self.about["source"], self.about["reason"], period_ms, rails, tuple(seen["t_ns"]), values,
                           tuple(self.about["skipped"]), seen["sampler"])  # fmt: skip
        slow = seen["telemetry"]
        self.telemetry = Telemetry(tuple(slow["t_ns"]), {name: tuple(v) for name, v in slow["values"].items()})


@contextmanager
def host_sampler(period_ms: float) -> Iterator[HostSampler]:
    """Samples this machine's sensors (RAPL, INA3221) from now on in a process of its own. Raises DeviceUnavailable."""
    argv = [sys.executable, str(agent_path()), "sample", "--period-ms", str(period_ms)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout
        try:
            first = process.stdout.readline()
            if not first:
                raise DeviceUnavailable(f"the sampler {agent_path()} could not start: run it by hand (`python3 {agent_path()} sample`).")
            yield HostSampler(process, json.loads(first))
        finally:
            process.kill()


class GpuEnergyCounter:
    """An NVIDIA GPU's own count of its energy (NVML, Volta and later), read at the edges of windows."""

    def __init__(self, index: int) -> None:
        self._t_ns: list[int] = []
        self._uj: list[float | None] = []
        self.reason = self._open(index)

    def _open(self, index: int) -> str | None:
        """None when the counter works, else why it does not."""
        import torch

        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is not installed: pip install 'prunectl[nvml]'"
        try:
            pynvml.nvmlInit()
            # by identity: NVML counts all GPUs in the order of their slots, CUDA those that are visible, the fastest first
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            return f"the GPU has no energy counter: {error}"
        self._read_mj: Callable[[], float] = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # since the driver was loaded
        return None

    def mark(self) -> None:
        if self.reason is None:
            self._t_ns.append(time.monotonic_ns())
            self._uj.append(self._read_mj() * 1e3)

    def power(self) -> Power:
        if self.reason is not None:
            return Power(None, self.reason)
        return Power("nvml", None, None, (Rail("gpu", "uJ"),), tuple(self._t_ns), {"gpu": tuple(self._uj)})
