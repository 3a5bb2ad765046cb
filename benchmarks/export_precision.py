"""python -m benchmarks.export_precision RUN: FP32, FP16 and INT8 files of one run side by side: accuracy, size, latency.

Every file is written, proven and measured on the test split by `prunectl export`; latency is ONNX Runtime's on this CPU, 2 threads,
batch 1, the files in turn. INT8 must stay within 1 point of FP32; where it does not, the layers that lost most are named. The
figures of docs/evidence/export.md are of the run that `prunectl demo` leaves."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import header, interleaved, machine
from prunectl import load_onnx_session
from prunectl.console import Console
from prunectl.export import verify
from prunectl.workflows.export import PRECISION_SLACK, Request, export

RESULT = Path(__file__).parent / "results" / "export_precision.json"
FILES = (("cpu", "fp32"), ("cpu", "fp16"), ("cpu", "int8"), ("orin", "int8"))
THREADS = 2
CALLS = 20  # in one turn: a small network takes a fraction of a millisecond


def measure(run: Path, rounds: int) -> dict[str, Any]:
    files, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for profile, precision in FILES:
            ui = Console(verbosity=-1)
            result = export(Request(run, profile=profile, precision=precision, out=Path(folder)), ui)
            entry = result["artifacts"][0]
            name = f"{profile} {precision}"
            session = load_onnx_session(entry["path"], threads=THREADS)
            image = verify.random_batches(session.spec, n=1)[0]
            calls[name] = lambda session=session, image=image: [session.run_normalised(image) for _ in range(CALLS)]
            kept = ("profile", "precision", "bytes", "params", "macs", "max_abs_diff", "top1_agreement", "accuracy")
            files[name] = {k: entry[k] for k in kept} | {"layers_that_lost": [w for w in result["warnings"] if "signal-to-noise" in w]}
            print(f"{name}: {entry['accuracy']:.2f} %, {entry['bytes']:,} bytes", flush=True)
        times = interleaved(calls, rounds=rounds)
    first = np.array(times["cpu fp32"])
    rows = []
    for name, file in files.items():
        low, middle, high = np.quantile(first / np.array(times[name]), (0.25, 0.5, 0.75))
        speed = {"median_ms": 1e3 * statistics.median(times[name]) / CALLS, "time_ratio": float(middle)}
        rows.append({"file": name, **file, **speed, "time_ratio_quartiles": [float(low), float(high)]})
    about = {"command": "python -m benchmarks.export_precision RUN", "model": result["model"], "dataset": result["dataset"]}
    return {
        **about,
        "run": Path(result["run"]).name,
        "threads": THREADS,
        "rounds": rounds,
        "weight_bits": {"cpu int8": 7},
        "machine": machine(),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| file | test accuracy, % | to FP32 | bytes | median, ms | faster (quartiles) |", "|---|---|---|---|---|---|"]
    full = result["rows"][0]["accuracy"]
    for r in result["rows"]:
        low, high = r["time_ratio_quartiles"]
        cells = [r["file"], f"{r['accuracy']:.2f}", f"{r['accuracy'] - full:+.2f}", f"{r['bytes']:,}", f"{r['median_ms']:.3f}"]
        lines.append(" | ".join(["", *cells, f"{r['time_ratio']:.2f} x ({low:.2f}-{high:.2f})", ""]).strip())
    return lines + [text for r in result["rows"] for text in ["", *r["layers_that_lost"]] if r["layers_that_lost"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    header(f"precisions in ONNX Runtime, {THREADS} threads; INT8 within {PRECISION_SLACK} point of FP32")
    result = measure(args.run, args.rounds)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
