"""python -m benchmarks.export_render [--check]: docs/evidence/export.md from the committed results of its three measurements, nothing else.

OMP_NUM_THREADS=1 PRUNECTL_ZOO=benchmarks/results/export_zoo.json pytest -m slow tests/export/test_export_zoo.py
python -m benchmarks.export_precision RUN       (the run that `prunectl demo` leaves)
python -m benchmarks.export_speed
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import export_precision, export_speed
from prunectl.workflows.export import PRECISION_SLACK

ZOO = Path(__file__).parent / "results" / "export_zoo.json"
TARGET = Path(__file__).parents[1] / "docs" / "evidence" / "export.md"


def zoo(result: dict[str, Any]) -> Iterator[str]:
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in result["rows"]:
        rows.setdefault((r["network"], r["kind"]), {})[r["profile"]] = r
    passed = sum(r["refused"] is None for r in result["rows"])
    yield from (
        "## The project's networks and six of torchvision's, for four of the five profiles (`gpu` was not run)",
        "",
        "Each cell is one file: written for the profile, linted, its MACs counted from the graph and equal to the network's, its answers",
        "compared with torch's on noise. The number is the largest difference of a logit over the largest logit (2e-5 is refused). `rtx`",
        "is also compiled by TensorRT for RTX, without a GPU; the engine's size is given. `tx2` is also read and run by onnxruntime",
        f"1.10.0 under Python 3.6{'' if result['old_reader'] else ' where one is installed, not in this run'}. Pruned: half of the",
        f"channels of every layer. Images of 64 x 64, 224 for AlexNet and ViT; 10 classes. {passed} of {len(result['rows'])} passed.",
        "",
        "    OMP_NUM_THREADS=1 PRUNECTL_ZOO=benchmarks/results/export_zoo.json pytest -m slow tests/export/test_export_zoo.py",
        "",
        f"With PRUNECTL_PY36_ORT naming a Python 3.6 that has onnxruntime 1.10.0. {versions(result)}",
        "",
        "| network | | M MACs | cpu | tx2 | tx2, old reader | orin | rtx | rtx engine, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for (name, kind), by in rows.items():
        old = by["tx2"].get("old_reader_max_rel")
        engine = by["rtx"].get("engine_bytes")
        cells = [cell(by[p]) for p in ("cpu", "tx2")] + ["-" if old is None else f"{old:.0e}"] + [cell(by[p]) for p in ("orin", "rtx")]
        yield (
            " | ".join([f"| {name}", kind, f"{by['cpu']['macs'] / 1e6:.0f}", *cells, "-" if engine is None else f"{engine / 1e6:.1f}"])
            + " |"
        )


def cell(row: dict[str, Any]) -> str:
    return f"{row['max_rel']:.0e}" if row["refused"] is None else f"refused: {row['refused']}"


def precision(result: dict[str, Any]) -> Iterator[str]:
    yield from (
        "## Precisions",
        "",
        f"{result['model']} on {result['dataset']} ({result['run']}): the files for ONNX Runtime, and the INT8 graph that TensorRT",
        f"reads, run by ONNX Runtime for its accuracy. Goal: INT8 within {PRECISION_SLACK:g} point of FP32, else the layers that lost most",
        f"are named below. {result['rounds']} rounds in turn, {result['threads']} threads, batch 1: medians, FP32's time over the file's.",
        *(
            []
            if result.get("weight_bits")
            else ["The INT8 file for the CPU had 8-bit weights then; files written since have 7 (docs/LOG.md)."]
        ),
        "",
        *origin(result),
        *export_precision.table(result),
    )


def speed(result: dict[str, Any]) -> Iterator[str]:
    yield from (
        "## Channels removed, time saved",
        "",
        f"{result['network']} at {result['image_size']} pixels in ONNX Runtime, {result['threads']} threads, batch 1,",
        f"{result['rounds']} rounds in turn. Goal: the time falls at least {export_speed.GOAL:g} times as much as the MACs (last column).",
        "",
        *origin(result),
        *export_speed.table(result),
    )


def origin(result: dict[str, Any]) -> Iterator[str]:
    m = result["machine"]
    yield from (f"    {result['command']}", "", f"{m['cpu']}, {m['cores']} cores, load {m['load']}. {versions(m)}", "")


def versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + "."


def text() -> str:
    """The document; a measurement without its file has no section."""
    lines = ["# Exported files", "", "Rendered by `python -m benchmarks.export_render` from benchmarks/results. Do not edit."]
    for path, section in ((ZOO, zoo), (export_precision.RESULT, precision), (export_speed.RESULT, speed)):
        if path.is_file():
            lines += ["", *section(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text() else f"{TARGET} differs from the results: render it again")
    TARGET.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
