"""One thread everywhere: results of a CPU run are compared bit for bit, which holds for one thread count only."""

from __future__ import annotations

import gc
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every child

import pytest

# A suite started in the background or under nohup ignores these, and so would every child that a test sends them to.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _no_data_of_this_machine(tmp_path_factory):
    """Neither a user's data sets nor a CI's or a terminal's settings reach the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNECTL_DATA", str(tmp_path_factory.mktemp("no-data")))
        for name in ("CI", "NO_COLOR", "FORCE_COLOR", "RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


def pytest_collection_finish():
    """What was imported stays: each look of the garbage collector through all of torch takes a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The files with the longest tests first: with two workers, one that begins last ends alone."""
    items.sort(key=lambda item: "/workflows/" not in item.path.as_posix())
