"""The tree of errors: each class ends in the status its docstring draws."""

from __future__ import annotations

import re

import pytest

from prunectl import errors
from prunectl.errors import ExitStatus, PrunectlError, UnknownName

CLASSES = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, PrunectlError)}


def test_the_drawn_tree_is_the_real_one():
    drawn = {name: int(status) for name, status in re.findall(r"(\w+) +(\d+)  ", errors.__doc__ or "")}
    assert drawn == {name: int(c.status) for name, c in CLASSES.items()}


def test_the_statuses_are_the_documented_ones():
    assert {s.name: int(s) for s in ExitStatus} == {
        "OK": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "UNSATISFIABLE": 3,
        "VERIFICATION": 4,
        "DEVICE": 5,
        "DATA": 6,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [("resnet9", "did you mean resnet8"), ("zzz", "known: resnet8, vgg16."), ("vgg-16", "did you mean vgg16?")],
)
def test_an_unknown_name_offers_what_is_near_or_all_there_is(given, said):
    assert said in str(UnknownName("model", given, ["vgg16", "resnet8"]))


def test_a_hint_ends_the_sentence():
    assert str(UnknownName("model", "x", ["a"], "Try b.")).endswith("known: a. Try b.")
