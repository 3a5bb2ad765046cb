"""The verbs and the loader as functions of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from running import run_folders

import prunectl
from prunectl.recipe import resolve
from prunectl.workflows.folder import Options

SMALL = ["model.width=0.5", "data.train_images=100", "data.val_fraction=0.02", "train.batch_size=50", "train.epochs=1"]


def test_a_verb_is_a_function_of_a_recipe_and_says_nothing(tmp_path, capsys):
    recipe = resolve("find-ticket", model="resnet8", dataset="fashion-mini", sets=[*SMALL, "ticket.detector=epoch:0.5"])
    result = prunectl.find_ticket(recipe, Options(out=tmp_path))
    assert result["outcome"] == "found" and run_folders(tmp_path) == [recipe.run_name, "latest"]
    assert capsys.readouterr() == ("", "")
    net = prunectl.load(tmp_path / recipe.run_name)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_runs_go_where_a_command_would_put_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = resolve("train", model="resnet8", dataset="fashion-mini", sets=[*SMALL[:-1], "train.epochs=0"])
    assert prunectl.train(recipe)["outcome"] == "untrained"
    assert prunectl.load("runs/latest") is not None


def test_the_package_alone_imports_nothing_heavy_and_knows_its_names():
    code = "import sys, prunectl; print(prunectl.__version__); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        prunectl.prune  # noqa: B018
    for name in ("load", "train", "find_ticket", "load_onnx_session"):
        assert name in prunectl.__all__ and callable(getattr(prunectl, name))
