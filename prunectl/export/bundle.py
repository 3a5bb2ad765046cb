"""A folder to carry to a board: the model, its record, the agent that builds and times it, one command, checksums."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.export.artifact import read_record, write_record, writing
from prunectl.files import sha256

SUMS = "SHA256SUMS"
MODEL = "model.onnx"


@dataclass(frozen=True)
class Bundle:
    """A written bundle. command: what to type on the board, inside the folder. bytes: of all its files."""

    path: Path
    command: str
    bytes: int


def write(folder: Path, model: Path, agent: Path, *, sparse: bool = False, shapes: str | None = None) -> Bundle:
    """The bundle of an exported file, in `folder`: whole, or nothing of it; an earlier bundle there is replaced.

    agent: deploy/agent.py. sparse: the engine may skip 2:4 zeros. shapes: trtexec's words for an input whose batch is free.
    Raises UsageError if `folder` holds something else or
    cannot be written, CorruptFile if the model is not the one its record describes."""
    record = read_record(model)
    if folder.exists() and not (folder / SUMS).is_file():
        raise UsageError(f"{folder} exists and is no bundle; choose another --out")
    options = [f"--batch {record.batch}"] if record.batch else [f"--shapes {shapes}"] if shapes else []
    options += ["--sparsity enable"] if sparse else []
    command = " ".join(["python3 agent.py bench", MODEL, f"--precision {record.precision}", *options, "-o raw.json"])
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            draft = Path(name) / folder.name
            draft.mkdir()
            shutil.copyfile(model, draft / MODEL)
            write_record(draft / MODEL, replace(record, file=MODEL))
            shutil.copyfile(agent, draft / "agent.py")
            (draft / "run.sh").write_text(_script(command), encoding="utf-8")
            (draft / "run.sh").chmod(0o755)
            files = sorted(draft.iterdir())
            (draft / SUMS).write_text("".join(f"{sha256(f)}  {f.name}\n" for f in files), encoding="utf-8")
            size = sum(f.stat().st_size for f in draft.iterdir())
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)
    return Bundle(folder, command, size)


def _script(command: str) -> str:
    return f"""#!/bin/sh
# Checks the files, builds the engine on this board and times it. Needs Python 3.6 and JetPack's trtexec.
cd "$(dirname "$0")" || exit 1
sha256sum -c {SUMS} || exit 4
exec {command} "$@"
"""
