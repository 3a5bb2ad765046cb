"""The two views of every registry, the source text's and the imported one, agree; names behave as documented."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prunectl.data import datasets
from prunectl.errors import UnknownName
from prunectl.export.profiles import profiles
from prunectl.models import models
from prunectl.pruning.constraints import constraints
from prunectl.pruning.criteria import criteria
from prunectl.pruning.detectors import detectors
from prunectl.registry import Registry, _entry_name, canonical

REGISTRIES = [models, datasets, criteria, detectors, constraints, profiles]
KINDS = [r.kind for r in REGISTRIES]


@pytest.mark.parametrize("registry", REGISTRIES, ids=KINDS)
def test_help_read_from_the_source_equals_what_importing_registers(registry):
    registry._import()
    assert registry.help() == {n: (e.__doc__ or "").strip().split("\n")[0] for n, e in sorted(registry._entries.items())}
    assert registry.names() == sorted(registry._entries)


@pytest.mark.parametrize("registry", REGISTRIES, ids=KINDS)
def test_every_entry_has_one_line_of_help_and_answers_to_its_name(registry):
    for name, text in registry.help().items():
        assert name == canonical(name) and 10 < len(text) < 150, (name, text)
        assert registry.get(name) is registry.get(name.replace("-", "_").upper())
        assert name in registry and registry.check(name.replace("-", "_")) == name


@pytest.mark.parametrize("registry", REGISTRIES, ids=KINDS)
def test_an_unknown_name_offers_the_nearest(registry):
    name = registry.names()[-1]
    for ask in (registry.get, registry.check):
        with pytest.raises(UnknownName, match=f"unknown {registry.kind} '{name}x': did you mean .*{name}"):
            ask(name + "x")
    with pytest.raises(UnknownName, match="known: "):
        registry.get("zzzzzzzzzzzzzzzz")


@pytest.mark.parametrize(
    ("symbol", "name"),
    [("early_bird", "early-bird"), ("EarlyBird", "early-bird"), ("KSparse", "k-sparse"), ("NM", "nm"), ("LpBall", "lp-ball"), ("l1", "l1")],
)
def test_names_follow_from_symbols(symbol, name):
    assert _entry_name(symbol) == name


def test_a_name_twice_and_a_missing_docstring_are_refused_at_once():
    registry = Registry("thing")

    def first() -> None:
        """A first thing."""

    def bare() -> None: ...

    registry.register(first)
    with pytest.raises(ValueError, match="twice"):
        registry.register(first)
    with pytest.raises(ValueError, match="docstring"):
        registry.register(bare)
    assert registry.register(name="Other_Name")(first) is first
    assert set(registry._entries) == {"first", "other-name"}


def test_help_imports_nothing():
    code = (
        "import sys; from prunectl.registry import Registry; help = Registry('criterion', 'pruning/criteria.py').help();"
        "sys.exit(not help or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
