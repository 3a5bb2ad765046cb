"""Cells of a comparison: one command line of the tool, one committed JSON; a cell that has its JSON is done.

Accuracy cells may run beside other work; wall times are not read from them."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPOCHS = 20
TRAIN_IMAGES = 18_000  # with the carved validation images about 20,000 of Fashion-MNIST's 60,000
NETS = {
    "thin": ("resnet8", 1.0),
    "wide": ("resnet18", 0.25),
    "wider": ("resnet18", 0.5),
    "full-thin": ("resnet8", 1.0),  # these two on all 60,000 images
    "full": ("resnet18", 1.0),
}
BULKY = ("distances", "detectors", "versions", "warnings")  # kept in the run folder


@dataclass(frozen=True)
class Cell:
    """One run of the command line. `arm` names what is compared, `verb` and `options` say how.

    judged: `val` while an arm is being chosen, so that no test image is read; then `test`."""

    arm: str
    net: str
    seed: int
    verb: str
    options: tuple[str, ...] = ()
    judged: str = "test"
    program: str = "prunectl"

    @property
    def name(self) -> str:
        return "-".join([self.net, self.arm, *(["val"] if self.judged == "val" else []), f"s{self.seed}"])

    def command(self, out: str) -> list[str]:
        model, width = NETS[self.net]
        sets = [] if self.net.startswith("full") else [f"model.width={width}", f"data.train_images={TRAIN_IMAGES}"]
        sets += ["data.final=val"] if self.judged == "val" else []
        return [
            *(self.program, self.verb, model, "fashion-mnist", "--epochs", str(EPOCHS), "--seed", str(self.seed)),
            *(part for s in sets for part in ("--set", s)),
            *self.options,
            *("--out", out, "--json", "--resume", "--no-progress"),
        ]


Prepare = Callable[[Cell, str], None]  # what a cell's run folder is given before it starts


def call(program: str, *words: str) -> dict[str, Any]:
    """The JSON document that a command prints. Ends this program where it was refused or failed."""
    done = subprocess.run([sys.executable, "-m", program, *words], stdout=subprocess.PIPE, text=True, check=False)
    document = dict(json.loads(done.stdout or "{}"))
    if done.returncode not in (0, 3) or document.get("outcome", "error") == "error":  # 3: no ticket found, a result too
        sys.exit(f"exit {done.returncode}: {program} {' '.join(words)}")
    return document


def answer(cell: Cell, runs: str, *flags: str) -> dict[str, Any]:
    """What the cell's command prints, with these flags more."""
    return call(*cell.command(runs), *flags)


def folder_of(cell: Cell, runs: str) -> Path:
    """Where the cell's run is or will be."""
    return Path(runs) / answer(cell, runs, "--dry-run")["run"]


def hand_over(source: Path, target: Path) -> None:
    """Gives a run folder that has not begun another's checkpoints, all or none: it begins where that one ended."""
    half = target.with_name(f"{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source / "checkpoints", half / "checkpoints")
    shutil.copy(source / "recipe.yaml", half)  # marks a run folder; the cell writes its own over it
    half.rename(target)


def run(cell: Cell, runs: str, results: Path) -> None:
    """Runs one cell, its log on stderr, and writes its result."""
    result = answer(cell, runs)
    kept = {k: v for k, v in result.items() if k not in BULKY}
    kept["run"] = Path(result["run"]).name
    kept.update({k: Path(v).name for k, v in kept.items() if k in ("ticket", "compact", "dense", "saved", "start") and v})
    if kept.get("channel_tickets"):
        kept["channel_tickets"] = [t | {"saved": Path(t["saved"]).name} for t in kept["channel_tickets"]]
    if "detectors" in result:
        kept["detectors"] = {name: {"fires_at": d["fires_at"]} for name, d in result["detectors"].items()}
        kept["curves"] = {
            name: [[d["epoch"], d["max"]] for d in found["distances"] if d["max"] is not None]
            for name, found in result["detectors"].items()
        }
    kept["versions"] = {k: result["versions"][k] for k in ("prunectl", "torch")}
    record = {"cell": cell.name, "arm": cell.arm, "net": cell.net, "seed": cell.seed, "judged": cell.judged}
    hardware = json.loads((Path(result["run"]) / "run.json").read_text(encoding="utf-8"))["hardware"]
    record |= {"command": " ".join(cell.command("runs")), "hardware": hardware, "result": kept}
    results.mkdir(exist_ok=True)
    (results / f"{cell.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(results: Path) -> list[dict[str, Any]]:
    """The committed cells, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]


def mean_sd(values: list[float], *, sign: bool = False) -> str:
    """`90.12 ± 0.34`, without the deviation where there is one value, and `-` where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def digest_of(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


Picture = tuple[Callable[[Path], None], Callable[[], Any]]  # what draws it, and the numbers that it shows


def publish(texts: Mapping[Path, Callable[[], str]], pictures: Mapping[Path, Picture]) -> None:
    """Writes what is rendered; with --check, ends in an error where the files at hand say something else."""
    if "--check" in sys.argv:
        old = outdated(texts, pictures)
        sys.exit(f"{', '.join(old)}: not what the cells say; render again" if old else 0)
    for path, text in texts.items():
        path.write_text(text(), encoding="utf-8")
    for path, (plot, _) in pictures.items():
        plot(path)


def outdated(texts: Mapping[Path, Callable[[], str]], pictures: Mapping[Path, Picture]) -> list[str]:
    """Names of files that are not what the cells say; a picture carries the digest of its numbers."""
    from PIL import Image

    old = [path.name for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text()]
    for path, (_, numbers) in pictures.items():
        if not path.is_file() or Image.open(path).info.get("Description") != digest_of(numbers()):
            old.append(path.name)
    return old


def main(stages: Mapping[str, Callable[[], Sequence[Cell]]], results: Path, description: str, prepare: Prepare | None = None) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--runs", default="runs/cells")
    parser.add_argument("--list", action="store_true", help="what is done and what is not, and run nothing")
    args = parser.parse_args()
    for cell in stages[args.stage]():
        if args.net not in (None, cell.net) or args.only not in cell.name:
            continue
        done = (results / f"{cell.name}.json").is_file()
        if args.list:
            print("done" if done else "open", cell.name)
        elif not done:
            print(f"== {cell.name}", file=sys.stderr, flush=True)
            if prepare:
                prepare(cell, args.runs)
            run(cell, args.runs, results)
