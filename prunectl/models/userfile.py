"""A user's own network: path/to/file.py:function, called with the arguments that it takes."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prunectl.errors import PrunectlError, UnknownName, UsageError


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """What `function` of `file.py:function` returns, given those of `arguments` that it names.

    Raises UsageError with file and line for whatever goes wrong inside the file."""
    file, _, function_name = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"model '{name}': there is no file {file}; a relative path starts at the folder you are in, {Path.cwd()}")
    with blamed_on(path), _importing_from(path.parent):
        function = _function(path, function_name)
        model = function(**_accepted(function, arguments, name))
        if not isinstance(model, nn.Module):
            raise UsageError(f"model '{name}': {function_name} returned {type(model).__name__}; expected a torch.nn.Module")
        if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            _materialise(model, arguments)
    known = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    if odd := [key for key in model.state_dict() if key not in known]:
        raise UsageError(f"model '{name}': {odd[0]} is no tensor of the network, and its tensors alone are saved: drop get_extra_state")
    return model


def _materialise(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Lazy layers take their sizes from an image, while the weights still depend on the seed alone."""
    size = arguments["image_size"]
    with torch.no_grad():
        model.eval()(torch.zeros(1, arguments["in_channels"], size, size))
    model.train()


def sources(name: str) -> list[Path]:
    """The file of `file.py:function` and those of its neighbours that it imports, itself or through another."""
    found: list[Path] = []
    todo = [Path(name.rpartition(":")[0]).expanduser()]
    home = todo[0].parent
    while todo:
        file = todo.pop()
        if file.is_file() and file not in found:
            found.append(file)
            for node in ast.walk(ast.parse(file.read_bytes())):
                imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for module in (home / n.replace(".", "/") for n in imported):
                    todo += [module.with_suffix(".py"), module / "__init__.py"]
    return found


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Turns any error raised inside into one UsageError that names the last line of `path` it came through."""
    try:
        yield
    except PrunectlError:
        raise
    except (Exception, SystemExit) as error:
        place = ":".join([str(path), *_lines(error, path)[-1:]])
        what = [type(error).__name__, *str(error).splitlines()[:1]]  # torch's messages go on for lines
        raise UsageError(f"{place}: {': '.join(what)}") from error


def _lines(error: BaseException, path: Path) -> list[str]:
    """The lines of `path` that the error came through, outermost first."""
    source = str(path.absolute())
    lines = [str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    if isinstance(error, SyntaxError) and error.filename == source:
        lines.append(str(error.lineno))
    return lines


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """The file may import its neighbours; those of the next file, which may have the same names, are others."""
    before, known, home = list(sys.path), set(sys.modules), folder.resolve()
    sys.path.insert(0, str(home))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            neighbour = name.partition(".")[0]
            if (home / f"{neighbour}.py").is_file() or (home / neighbour).is_dir():
                del sys.modules[name]


def _function(path: Path, name: str) -> Callable[..., Any]:
    module_name = f"prunectl_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    known: dict[str, Callable[..., Any]] = {
        key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")
    }
    if name not in known:
        raise UnknownName(f"function in {path}", name, known)
    return known[name]


def _accepted(function: Callable[..., Any], arguments: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named |= arguments.keys() - ({"width"} if arguments["width"] == 1 else set())
    if required - arguments.keys():
        raise UsageError(
            f"model '{name}': its function requires {', '.join(sorted(required - arguments.keys()))}; it gets {', '.join(arguments)}"
        )
    if arguments["width"] != 1 and "width" not in named:
        raise UsageError(f"model.width = {arguments['width']:g} with model '{name}': its function takes no `width`; leave it at 1")
    return {key: value for key, value in arguments.items() if key in named}
