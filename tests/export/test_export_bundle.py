import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from export_nets import SPEC

from prunectl.errors import CorruptFile, UsageError
from prunectl.export import bundle, onnx
from prunectl.export.artifact import read_record, record_path, write_record
from prunectl.export.session import load_onnx_session


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tx2_model, tx2):
    path = tmp_path_factory.mktemp("saved") / "tiny-tx2.onnx"
    onnx.save(tx2_model, path, spec=SPEC, profile=tx2, precision="fp16")
    return path


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """A stand-in for the board's agent: prints what it was told."""
    path = tmp_path_factory.mktemp("agent") / "agent.py"
    path.write_text("import sys\nprint(*sys.argv[1:])\n")
    return path


def test_a_bundle_is_complete_checked_and_runs_by_its_one_command(tmp_path, saved, agent):
    made = bundle.write(tmp_path / "deploy", saved, agent)
    assert sorted(p.name for p in made.path.iterdir()) == ["SHA256SUMS", "agent.py", "model.json", "model.onnx", "run.sh"]
    assert made.command == "python3 agent.py bench model.onnx --precision fp16 --batch 1 -o raw.json"
    assert made.bytes == sum(p.stat().st_size for p in made.path.iterdir())
    done = subprocess.run([made.path / "run.sh", "--duration-s", "1"], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "bench model.onnx --precision fp16 --batch 1 -o raw.json --duration-s 1"
    assert read_record(made.path / "model.onnx").sha256 == read_record(saved).sha256
    assert load_onnx_session(made.path / "model.onnx").spec == SPEC


def test_a_bundle_of_a_2_4_file_asks_for_sparse_kernels(tmp_path, saved):
    made = bundle.write(tmp_path / "deploy", saved, Path(__file__).parents[2] / "deploy" / "agent.py", sparse=True)
    assert "--sparsity enable" in made.command
    done = subprocess.run([made.path / "run.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "trtexec" in done.stderr  # understood, up to the compiler that is not here


def test_a_damaged_bundle_does_not_run(tmp_path, saved, agent):
    made = bundle.write(tmp_path / "deploy", saved, agent)
    with (made.path / "model.onnx").open("ab") as file:
        file.write(b"x")
    done = subprocess.run([made.path / "run.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "model.onnx: FAILED" in done.stdout


def test_a_bundle_replaces_a_bundle_and_nothing_else(tmp_path, saved, agent):
    first = bundle.write(tmp_path / "deploy", saved, agent)
    (first.path / "raw.json").write_text("{}")
    bundle.write(tmp_path / "deploy", saved, agent)
    assert not (first.path / "raw.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="exists and is no bundle"):
        bundle.write(tmp_path / "mine", saved, agent)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_what_fails_leaves_no_folder(tmp_path, saved, agent):
    copy = tmp_path / "model.onnx"
    shutil.copyfile(saved, copy)
    with pytest.raises(UsageError, match=r"model\.json is missing"):
        bundle.write(tmp_path / "deploy", copy, agent)
    shutil.copyfile(saved.with_suffix(".json"), tmp_path / "model.json")
    copy.write_bytes(copy.read_bytes() + b"x")
    with pytest.raises(CorruptFile, match="sha256 differs"):
        bundle.write(tmp_path / "deploy", copy, agent)
    with pytest.raises(UsageError, match="cannot be written"):
        bundle.write(tmp_path / "deploy", saved, tmp_path / "no-agent.py")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.onnx"]


@pytest.mark.parametrize("shapes", [None, "input:8x3x16x12"])
def test_the_real_agent_accepts_the_command(tmp_path, saved, shapes):
    agent = Path(__file__).parents[2] / "deploy" / "agent.py"
    if not agent.is_file():
        pytest.skip("deploy/agent.py is not in this checkout")
    if shapes:  # a record that says the batch is free
        shutil.copy(record_path(saved), tmp_path)
        saved = Path(shutil.copy(saved, tmp_path))
        write_record(saved, replace(read_record(saved), batch=None))
    made = bundle.write(tmp_path / "deploy", saved, agent, shapes=shapes)
    assert ("--shapes input:8x3x16x12" in made.command) == bool(shapes)
    done = subprocess.run([made.path / "run.sh", "--root", str(tmp_path)], capture_output=True, text=True, check=False)
    assert "unrecognized arguments" not in done.stderr
    assert "trtexec" in done.stderr  # it understood, and there is no board here
    assert done.returncode == 5
