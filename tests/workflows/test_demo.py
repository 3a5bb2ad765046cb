"""`prunectl demo`, whole: what a new user runs first."""

from __future__ import annotations

import time

import pytest
from running import installed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_demo_shows_a_table_and_answers_from_disk_the_second_time(tmp_path):
    first = installed("demo", "--out", tmp_path, "--json", timeout=1500)
    assert first.code == 0 and "error" not in first.err, first.err
    result = first.document
    assert result["verb"] == "demo" and result["outcome"] == "found"
    assert result["train"]["accuracy"]["top1"] > 75 and result["find_ticket"]["accuracy"]["final"] > 70
    assert result["files"]["ticket"] < result["files"]["dense"]
    started = time.monotonic()
    again = installed("demo", "--out", tmp_path, timeout=600)
    assert again.code == 0 and again.out.count("is finished") == 2 and time.monotonic() - started < 300
    for row in ("validation at the draw", "re-calibrated", "test at the end", "MACs", "parameters", "training FLOPs", "file"):
        assert row in again.out, row
