"""python -m benchmarks.tickets STAGE [--net thin|wide] [--only TEXT] [--runs DIR]: runs the cells that have no result yet."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.tickets.cells import STAGES, Cell

RESULTS = Path(__file__).parent / "results"
BULKY = ("distances", "detectors")  # kept in the run folder; the deciding curve is kept here


def run(cell: Cell, runs: str) -> None:
    """Runs one cell, its log on stderr, and writes its result when the command ended well (0) or found no ticket (3)."""
    program, *arguments = cell.command(runs)
    done = subprocess.run([sys.executable, "-m", program, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"{cell.name}: exit {done.returncode}: {' '.join(cell.command(runs))}")
    result = json.loads(done.stdout)
    kept = {k: v for k, v in result.items() if k not in BULKY}
    kept["run"] = Path(result["run"]).name
    kept.update({k: Path(v).name for k, v in kept.items() if k in ("ticket", "compact", "dense", "saved") and v})
    kept["detectors"] = {name: {"fires_at": d["fires_at"]} for name, d in result.get("detectors", {}).items()}
    kept["curve"] = [[d["epoch"], d["max"]] for d in result.get("distances", [])]
    cell_record = {
        "cell": cell.name,
        "arm": cell.arm,
        "net": cell.net,
        "seed": cell.seed,
        "command": " ".join(cell.command("runs")),
        "result": kept,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{cell.name}.json").write_text(json.dumps(cell_record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--net")
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", default="runs/tickets")
    args = parser.parse_args()
    for cell in STAGES[args.stage]():
        if (args.net in (None, cell.net)) and args.only in cell.name and not (RESULTS / f"{cell.name}.json").is_file():
            print(f"== {cell.name}", file=sys.stderr, flush=True)
            run(cell, args.runs)


if __name__ == "__main__":
    main()
