"""python -m benchmarks.bench_overhead [RUN]: what `prunectl bench` costs, and whether a sceptic's own loop finds the same ratio.

Goals: `--quick` with its files exported already in under 20 s, start-up included; the sampler under 2 % of one core at 20 Hz;
the speed-up within 5 % of an independent loop of ONNX Runtime. Without RUN a small one is trained first."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import header, seconds
from prunectl.bench.board import agent_path

RAILS = ("VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR", "VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI")

# The sceptic: its own process, its own clock, no code of ours. Prints the median of its times in ms.
LOOP = """
import sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {i.name: numpy.random.default_rng(1).standard_normal(i.shape).astype("float32") for i in session.get_inputs()}
for _ in range(50):
    session.run(None, feed)
times, end = [], time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end:
    begin = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - begin)
print(numpy.median(times) * 1e3)
"""


def prunectl(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "prunectl", *map(str, words), "--json"]
    document: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return document


def small_run(out: Path) -> Path:
    """The demo's network and data, two epochs of it: latency does not depend on the weights."""
    return Path(prunectl("find-ticket", "resnet8", "fashion-mini", "--epochs", 2, "--detector", "epoch:1", "--out", out)["run"])


def quick(run: Path, times: int) -> None:
    prunectl("bench", run, "--quick")  # exports
    took = [seconds(lambda: prunectl("bench", run, "--quick")) for _ in range(times)]
    print(f"bench --quick, files exported: median {statistics.median(took):.1f} s, max {max(took):.1f} s of {times} (goal 20 s)")


def sampler(length_s: float) -> None:
    """The agent's own count of its CPU time while it reads six rails, a clock and a temperature of a TX2's tree at 20 Hz."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = {f"sys/class/thermal/thermal_zone0/{k}": v for k, v in (("type", "GPU-therm"), ("temp", "33000"))}
        files["sys/class/devfreq/17000000.gp10b/cur_freq"] = "1300500000"
        for i, rail in enumerate(RAILS):
            folder = f"sys/bus/i2c/drivers/ina3221x/0-004{1 - i // 3}/iio:device{i // 3}"
            files |= {f"{folder}/rail_name_{i % 3}": rail, f"{folder}/in_power{i % 3}_input": str(1000 + i)}
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text + "\n")
        command = [sys.executable, str(agent_path()), "sample", "--root", name, "--period-ms", "50"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            time.sleep(length_s)
            seen = json.loads(process.communicate()[0].splitlines()[1])
    cost, n = seen["sampler"], len(seen["t_ns"])
    share = cost["cpu_s"] / cost["wall_s"]
    print(f"sampler, {len(RAILS)} rails: {n / cost['wall_s']:.1f} readings/s, {share:.2%} of a core over {cost['wall_s']:.0f} s (goal 2 %)")


def agreement(run: Path, length_s: float, rounds: int) -> None:
    """The verb's ratio on one thread against the sceptic's, taken in turns before and after it."""
    files = [run / "export" / f"{name}-cpu-fp32.onnx" for name in ("dense", "compact")]

    def sceptic() -> float:
        dense, small = (
            float(subprocess.run([sys.executable, "-c", LOOP, str(f), str(length_s)], check=True, capture_output=True, text=True).stdout)
            for f in files
        )
        return small / dense

    before = [sceptic() for _ in range(rounds)]
    document = prunectl("bench", run, "--threads", 1, "--duration", length_s, "--repeats", max(3, 2 * rounds))
    theirs = statistics.median(before + [sceptic() for _ in range(rounds)])
    ours = next(r for r in document["ratios"] if r["metric"] == "latency_ms")
    low, high = ours["ci95"]
    print(f"ticket/dense latency: bench {ours['median']:.4f} ({low:.4f} to {high:.4f}), independent loop {theirs:.4f}: ", end="")
    print(f"{ours['median'] / theirs - 1:+.2%} (goal 5 %)")
    for warning in document["warnings"]:
        print(f"  {warning}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a finished find-ticket run")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args([] if __name__ != "__main__" else None)  # the short measurements in turn take no arguments
    header("bench")
    with tempfile.TemporaryDirectory() as scratch:
        run = given.run or small_run(Path(scratch))
        quick(run, given.rounds)
        sampler(6 * given.seconds)
        agreement(run, given.seconds, given.rounds)


if __name__ == "__main__":
    main()
