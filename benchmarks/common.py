"""What the benchmarks share: synthetic data of a real shape, paired timing, and the line that says where it ran."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.data.dataset import Dataset, DatasetInfo, View
from prunectl.data.memory import MemoryPool, in_process
from prunectl.versions import versions


def random_images(n: int, channels: int, size: int, classes: int = 10) -> Dataset:
    """A data set of random uint8 images held in memory, augmented as CIFAR is."""
    rng = np.random.default_rng(0)
    pool = MemoryPool(rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8), rng.integers(0, classes, n))
    everything = np.arange(n)
    mean, std = (0.5,) * channels, (0.25,) * channels
    info = DatasetInfo("random", tuple(map(str, range(classes))), channels, size, mean, std, "none", n, n, n, "crop-flip")
    return Dataset(info, dict.fromkeys(("train", "val", "test"), everything), partial(in_process, View(pool, size, "none", mean, std)))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(first: Callable[[], object], second: Callable[[], object], *, pairs: int) -> tuple[float, float, float]:
    """Medians of both in seconds and of their ratio first/second, run in turn; one warm-up of each before."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(pairs)]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), statistics.median(a / b for a, b in times)


def interleaved(work: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times over, all of them in turn within a round so that what else runs here hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, call in work.items():
            took = seconds(call)
            if turn >= warm_up:
                times[name].append(took)
    return times


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "versions": versions()}


def header(title: str) -> None:
    m = machine()
    print(f"## {title}\n{m['cpu']}, {m['cores']} cores, {torch.get_num_threads()} threads, load {m['load']}; {m['versions']}", flush=True)
