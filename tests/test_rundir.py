"""One writer, nothing half-written, nothing thrown away too early."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunectl import files, rundir
from prunectl.errors import CorruptFile, RunFolderError
from prunectl.rundir import RunDir, opened


def _begin(run: RunDir) -> None:
    files.write_text(run.recipe, "verb: train\n")
    run.checkpoints.mkdir(exist_ok=True)


def _finish(run: RunDir) -> None:
    files.write_json(run.result, {"answer": 42})


def _open(out: Path, **flags: bool):
    return opened(out, "a-run", **{"resume": False, "overwrite": False, **flags})


def test_a_new_folder_is_made_and_one_that_stays_empty_can_be_discarded(tmp_path):
    with _open(tmp_path / "deep" / "runs") as run:
        assert run.path.is_dir() and not run.finished
        rundir.discard_if_empty(run)
    assert not run.path.exists()


def test_a_run_that_began_is_never_discarded(tmp_path):
    with _open(tmp_path) as run:
        _begin(run)
        rundir.discard_if_empty(run)
        assert run.recipe.is_file()


def test_unfinished_asks_and_finished_answers(tmp_path):
    with _open(tmp_path) as run:
        _begin(run)
    with pytest.raises(RunFolderError, match=r"unfinished.*--resume.*--overwrite"), _open(tmp_path):
        pass
    with _open(tmp_path, resume=True) as run:
        _finish(run)
    with _open(tmp_path) as run:
        assert run.finished and run.read_result() == {"answer": 42}


def test_a_run_that_saved_nothing_yet_starts_again_unasked(tmp_path):
    with _open(tmp_path) as run:
        files.write_text(run.recipe, "verb: train\n")
        files.write_json(run.info, {})
    with _open(tmp_path) as again:
        assert again.path == run.path


def test_a_finished_run_answers_where_nothing_can_be_written(tmp_path):
    """A folder in the lock's place stops root too, whom permissions do not."""
    with _open(tmp_path) as run:
        _begin(run)
        _finish(run)
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with _open(tmp_path) as again:
        assert again.read_result() == {"answer": 42}
    with pytest.raises(RunFolderError, match="cannot be written"), _open(tmp_path, overwrite=True):
        pass


def test_overwrite_throws_away_only_when_the_new_run_begins(tmp_path):
    """A refusal after the folder was opened (missing data, no such device) must not cost the old run."""
    with _open(tmp_path) as run:
        _begin(run)
        _finish(run)
    with _open(tmp_path, overwrite=True) as run:
        assert not run.finished
    with _open(tmp_path) as run:
        assert run.read_result() == {"answer": 42}
    with _open(tmp_path, overwrite=True) as run:
        (run.path / "sub").mkdir()
        (run.path / "sub" / "file").write_text("")
        (run.path / "link").symlink_to(tmp_path)
        rundir.clear(run)
        assert [p.name for p in run.path.iterdir()] == [".lock"]
    assert tmp_path.is_dir()


def test_clear_ends_with_the_file_that_makes_it_a_run_folder(tmp_path, monkeypatch):
    """Killed anywhere inside, what is left is an unfinished run folder or an empty one: both can be opened again."""
    with _open(tmp_path) as run:
        _begin(run)
        _finish(run)
        files.write_text(run.metrics, "")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **kw: (removed.append(self.name), unlink(self, **kw))[1])
    rundir.clear(run)
    assert (removed[0], removed[-1]) == ("result.json", "recipe.yaml")


def test_what_a_crash_left_half_written_is_swept_and_does_not_count(tmp_path):
    with _open(tmp_path) as run:
        (run.path / f".recipe.yaml.abc{files.UNFINISHED}").write_text("ver")
    with _open(tmp_path) as run:
        _begin(run)
        (run.path / "checkpoints" / f".epoch.safetensors.abc{files.UNFINISHED}").write_text("")
    with _open(tmp_path, resume=True) as run:
        assert sorted(p.name for p in run.path.rglob("*")) == [".lock", "checkpoints", "recipe.yaml"]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "thesis.tex").write_text("x")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match="no run folder"), _open(tmp_path, **flags):
            pass
    assert (tmp_path / "a-run" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="--out"), _open(tmp_path / place):
        pass


def test_another_process_is_refused_by_name_and_the_lock_dies_with_its_holder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from prunectl.rundir import opened\n"
        "with opened(Path(sys.argv[1]), 'a-run', resume=False, overwrite=False): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"), _open(tmp_path, **flags):
            pass
    holder.kill()
    holder.wait()
    with _open(tmp_path) as run:
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_latest_follows_the_newest_and_leaves_a_users_own_file(tmp_path):
    for name in ("one", "two"):
        with opened(tmp_path, name, resume=False, overwrite=False) as run:
            _begin(run)
            rundir.point_latest(run)
        assert os.readlink(tmp_path / "latest") == name
    assert rundir.find(tmp_path / "latest").path.name == "two"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("mine")
    rundir.point_latest(run)
    assert (tmp_path / "latest").read_text() == "mine"


def test_find_says_what_is_wrong(tmp_path):
    with pytest.raises(RunFolderError, match="no run was made here yet"):
        rundir.find(tmp_path / "latest")
    with pytest.raises(RunFolderError, match=r"no run folder.*recipe\.yaml"):
        rundir.find(tmp_path)


def test_a_damaged_result_is_named(tmp_path):
    run = RunDir(tmp_path)
    for text in ("{", "[]", "\x00"):
        run.result.write_text(text)
        with pytest.raises(CorruptFile, match=r"result\.json.*--overwrite"):
            run.read_result()


def test_the_log_and_its_csv_twin(tmp_path):
    run = RunDir(tmp_path)
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "note": {"a": [1, 2]}}]
    run.log(rows)
    assert rundir.read_jsonl(run.metrics) == rows
    with (tmp_path / "metrics.csv").open(newline="") as f:
        table = list(csv.DictReader(f))
    assert [r["loss"] for r in table] == ["0.5", "0.25"] and json.loads(table[1]["note"]) == {"a": [1, 2]} and table[0]["note"] == ""
    run.metrics.write_text(run.metrics.read_text()[:-4])
    assert rundir.read_jsonl(run.metrics) == rows[:1]
    assert rundir.read_jsonl(tmp_path / "nowhere") == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail() -> None:
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_written_files_can_be_read_by_others(tmp_path):
    """Temporary files are private; a run folder is not."""
    files.write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
