"""python -m benchmarks.startup: wall time of the verbs that load no torch, as whole processes; goal 0.3 s."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.common import header, seconds

RUNS = 15


def main() -> None:
    header("start-up")
    for arguments in (["--help"], ["list"], ["find-ticket", "resnet50", "imagenet", "--print-recipe"]):
        command = [sys.executable, "-m", "prunectl", *arguments]
        times = [seconds(lambda c=command: subprocess.run(c, check=True, capture_output=True)) for _ in range(RUNS)]
        print(f"prunectl {' '.join(arguments):<45} median {statistics.median(times):.3f} s, min {min(times):.3f} s of {RUNS}")


if __name__ == "__main__":
    main()
