"""What ships beside the agent: the container's recipe, the bench recipes, the words of the README."""

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standin_board
import yaml
from running import prunectl

from prunectl.bench.devices import devices, parse
from prunectl.bench.records import Settings
from prunectl.workflows.bench_plan import plan

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile.jetson").read_text()


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint, "this test needs hadolint: pip install -e '.[dev]'"
    said = subprocess.run([hadolint, str(ROOT / "Dockerfile.jetson")], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_the_dockerfile_copies_what_exists_and_starts_it():
    assert re.search(r"^FROM nvcr.io/nvidia/l4t-pytorch:r32.7.1-pth1.10-py3$", DOCKERFILE, re.M)
    for source in re.search(r"^COPY (.*) /opt/prunectl/$", DOCKERFILE, re.M).group(1).split():
        assert (ROOT / source).is_file()


def test_the_containers_commands_run_under_its_python(tmp_path):
    """The RUN and ENTRYPOINT lines that are Python, under 3.6, on a copy of what is copied."""
    shutil.copy(standin_board.AGENT, tmp_path / "agent.py")
    python = standin_board.board_python()
    for command in re.findall(r"python3 (-m py_compile )?/opt/prunectl/agent.py( --help)?", DOCKERFILE):
        words = f"{command[0]}{tmp_path / 'agent.py'}{command[1]}".split()
        assert subprocess.run([python, *words], capture_output=True).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/bench").glob("*.yaml")), ids=lambda p: p.stem)
def test_bench_recipes_are_settings(path, monkeypatch):
    recipe = yaml.safe_load(path.read_text())
    assert parse(recipe["device"])[0] in devices
    known = {field.name for field in dataclasses.fields(Settings)}
    assert set(recipe) == {"device", "profile", "bench"} and set(recipe["bench"]) <= known
    monkeypatch.setenv("PRUNECTL_JETSON", "nvidia@tx2")
    resolved = plan(recipe=path.stem)
    assert (resolved.device, resolved.profile) == (recipe["device"], recipe["profile"]) and resolved.settings.repeats >= 5


def test_settings_are_bounded():
    from prunectl.errors import UsageError

    for bad in ({"repeats": 0}, {"duration_s": 0}, {"precision": "fp8"}, {"sparsity": "force"}, {"period_ms": float("nan")}):
        with pytest.raises(UsageError, match=f"bench {next(iter(bad))} = "):
            Settings(**bad)
    quick = Settings().quick()
    assert quick.duration_s < 1.0 and quick.workspace_mb == Settings().workspace_mb


def test_the_readme_shows_benches_that_can_be_asked_for():
    """Every option of every `prunectl bench` in it exists, and every --set names a setting."""
    text = (ROOT / "deploy/README.md").read_text().replace("\\\n", " ")
    options = set(prunectl("bench", "--help").out.replace(",", " ").split())
    lines = [shlex.split(line) for line in re.findall(r"^ +(prunectl bench .*)$", text, re.M)]
    assert len(lines) >= 5
    for words in lines:
        assert {w for w in words if w.startswith("-")} <= options
        plan(host="nvidia@tx2", sets=[value for flag, value in itertools.pairwise(words) if flag == "--set"])


def test_the_readme_shows_commands_that_exist():
    text = (ROOT / "deploy/README.md").read_text()
    offered = subprocess.run([standin_board.board_python(), str(standin_board.AGENT), "--help"], capture_output=True, text=True).stdout
    for option in set(re.findall(r"agent\.py [^`\n]*?(--[a-z-]+)", text)):
        assert option in offered
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "deploy" / path).exists()
