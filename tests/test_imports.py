"""Who may import whom, and through which door each dependency comes in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prunectl

ROOT = Path(prunectl.__file__).parent
BASE = {"errors", "registry", "dist"}
MIDDLE = {"models", "data", "training", "export", "bench", "report"}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "dist": {"errors"},
    "files": {"errors"},
    "pruning": BASE,
    **dict.fromkeys(MIDDLE, BASE | {"files", "pruning"} | MIDDLE),
    "shipped": set(),
    "versions": set(),
    **{room: {"errors", "registry", "files", "shipped", "versions"} for room in ("recipe", "rundir", "console")},
    "workflows": BASE | {"files", "pruning", "recipe", "rundir", "console", "shipped", "versions"} | MIDDLE,
    "cli": {"errors", "registry", "recipe", "shipped", "rundir", "console", "workflows", "models", "data"},  # the last two for their lists
    "__main__": {"cli"},
    "__init__": {"workflows"} | MIDDLE,  # names handed on when they are asked for
}
DOORS = {
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"console"},
    "yaml": {"recipe"},
    "pydantic": {"recipe", "bench/records"},
    "torch_pruning": {"pruning/surgery"},
    "torch.distributed": {"dist"},
    "onnx": {"export", "bench", "workflows/export"},
    "onnxruntime": {"export", "bench"},
    "onnxslim": {"export"},
    "safetensors": {"training/checkpoint"},
    "subprocess": {"bench", "export", "pruning/sfw_kernel"},
    "pickle": {"data/cifar_pickle"},  # its own reader of the one published format that is a pickle; it builds no objects
    "matplotlib": {"report"},
    "jinja2": {"report"},
}


def _modules() -> dict[str, ast.Module]:
    """Module path below the package, as in pruning/surgery -> its syntax tree."""
    return {str(p.relative_to(ROOT).with_suffix("")): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(ROOT.rglob("*.py"))}


def _imported(tree: ast.Module) -> set[str]:
    """Dotted names of everything imported anywhere in a module, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _room(module: str) -> str:
    return module.partition("/")[0]


MODULES = _modules()


def test_the_walk_sees_imports_at_the_top_in_functions_and_by_submodule():
    tree = ast.parse("import a.b\ndef f():\n    from c import d\n")
    assert _imported(tree) == {"a.b", "c", "c.d"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    rooms = {name.split(".")[1] for name in _imported(MODULES[module]) if name.startswith("prunectl.")} - {"__version__"}
    room = _room(module)
    assert rooms <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_one_door_per_dependency(dependency):
    users = {m for m, tree in MODULES.items() if any(n == dependency or n.startswith(dependency + ".") for n in _imported(tree))}
    assert {m for m in users if not DOORS[dependency] & {m, _room(m)}} == set()


def test_nothing_unpickles():
    """torch.load is the other door to pickle."""
    source = {m: (ROOT / f"{m}.py").read_text(encoding="utf-8") for m in MODULES}
    assert [m for m, text in source.items() if "torch.load(" in text or "weights_only" in text or "joblib" in text] == []


@pytest.mark.parametrize("argv", [["--help"], ["list"], ["list", "models"], ["train", "--help"], ["find-ticket", "--help"], ["--version"]])
def test_help_and_lists_import_no_torch(argv):
    code = (
        "import sys; from prunectl.cli.process import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'torchvision', 'numpy', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stderr == ""


def test_a_recipe_is_resolved_and_printed_without_torch():
    code = (
        "import sys; from prunectl.cli.process import run; status = run(['find-ticket', 'resnet8', 'fashion-mini', '--print-recipe']);"
        "sys.exit('imported torch' if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
