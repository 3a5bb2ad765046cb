"""Named collections of functions and classes, listed without importing what they need.

An entry's name is its function's name with `-` for `_` (a class's, in kebab case) and its help the first line of its
docstring. `Registry.help()` reads both from the source by `ast`, so that `prunectl list` never imports torch; a test
holds the two views equal. A name registered twice is a bug and raises at import."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

from prunectl.errors import UnknownName

Entry = Callable[..., Any]
T = TypeVar("T", bound=Entry)
PACKAGE = Path(__file__).parent


def canonical(name: str) -> str:
    """The one spelling of a name: `-` and `_` are equal, case is ignored."""
    return name.strip().lower().replace("_", "-")


def _entry_name(symbol: str) -> str:
    """early_bird and EarlyBird are both early-bird; KSparse is k-sparse; NM is nm."""
    return canonical(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", symbol))


class Registry:
    """The entries of one kind, defined in the modules `modules` below the package (`pruning/criteria.py`)."""

    def __init__(self, kind: str, *modules: str) -> None:
        self.kind = kind
        self._modules = modules
        self._entries: dict[str, Entry] = {}

    @overload
    def register(self, entry: T, *, name: str | None = None) -> T: ...
    @overload
    def register(self, *, name: str) -> Callable[[T], T]: ...
    def register(self, entry: Entry | None = None, *, name: str | None = None) -> Any:
        """Decorator, bare or with an explicit name."""
        if entry is None:
            return lambda e: self.register(e, name=name)
        key = canonical(name) if name else _entry_name(entry.__name__)
        if key in self._entries:
            raise ValueError(f"{self.kind} '{key}' is registered twice")
        if not (entry.__doc__ or "").strip():
            raise ValueError(f"{self.kind} '{key}' has no docstring; its first line is the help text")
        self._entries[key] = entry
        return entry

    def names(self) -> list[str]:
        return sorted(self.help())

    def __contains__(self, name: str) -> bool:
        return canonical(name) in self.help()

    def get(self, name: str, *, hint: str = "") -> Entry:
        """The entry called `name`. Raises UnknownName with the nearest names."""
        self._import()
        try:
            return self._entries[canonical(name)]
        except KeyError:
            raise UnknownName(self.kind, name, self._entries, hint) from None

    def check(self, name: str, *, hint: str = "") -> str:
        """`name` in its one spelling, without importing the entry. Raises UnknownName."""
        known = self.help()
        if canonical(name) not in known:
            raise UnknownName(self.kind, name, known, hint)
        return canonical(name)

    def help(self) -> dict[str, str]:
        """name -> first docstring line, read from the source text."""
        found: dict[str, str] = {}
        for module in self._modules:
            tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    name = _registered_as(node)
                    if name:
                        found[name] = (ast.get_docstring(node) or "").strip().split("\n")[0]
        return dict(sorted(found.items()))

    def _import(self) -> None:
        for module in self._modules:
            importlib.import_module("prunectl." + module.removesuffix(".py").replace("/", "."))


def _registered_as(node: ast.FunctionDef | ast.ClassDef) -> str | None:
    for deco in node.decorator_list:
        call = deco if isinstance(deco, ast.Call) else None
        target = call.func if call else deco
        if not (isinstance(target, ast.Attribute) and target.attr == "register"):
            continue
        for keyword in call.keywords if call else []:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                return canonical(str(keyword.value.value))
        return _entry_name(node.name)
    return None
