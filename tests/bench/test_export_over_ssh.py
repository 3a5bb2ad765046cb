"""`prunectl export --host`: the engine of an exported file, built on the board by the agent over a real ssh connection.

trtexec is the stand-in of this folder, so every engine here is SIMULATED, and says so."""

from pathlib import Path

import pytest
from running import prunectl

from prunectl.files import sha256

SMALL = ("--set", "model.width=0.5", "--set", "data.train_images=400", "--epochs", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained network: what a board builds does not depend on its weights."""
    out = tmp_path_factory.mktemp("untrained")
    done = prunectl("train", "resnet8", "fashion-mini", *SMALL, "--out", out)
    assert done.code == 0, done.err
    return out / "latest"


@pytest.fixture
def at_the_board(board, sshd, monkeypatch):
    """`--host board` reaches the board for as long as the test lasts; nothing is left there afterwards but its cache."""
    with sshd(board) as server:
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
        yield board
    assert board.leftovers() == []


def exported(run, out, *options):
    done = prunectl("export", run, "--out", out, "--json", *options)
    assert done.code == 0, done.err
    file, engine = done.document["artifacts"]
    return done, file, engine


def test_an_engine_is_built_on_the_board_once(at_the_board, run, tmp_path):
    at_the_board.set_trtexec(version=8201, build_s=0.2)
    done, file, engine = exported(run, tmp_path, "--profile", "tx2", "--precision", "fp16", "--host", "board")
    on_the_board = Path(engine["path"])  # its file system is ours here
    assert at_the_board.cache in on_the_board.parents and on_the_board.read_bytes() == b"ptrt" + Path(file["path"]).read_bytes()
    assert (engine["sha256"], engine["bytes"]) == (sha256(on_the_board), on_the_board.stat().st_size)
    assert (engine["kind"], engine["host"], engine["compiler"], engine["gpus"]) == ("engine", "board", "trtexec 8.2.1", ["quill"])
    assert 0.2 <= engine["build_s"] < 30 and not engine["cached"] and "--fp16" in engine["command"]
    assert engine["accuracy"] is None and "bench" in engine["reason"]
    assert "trtexec is a script" in engine["simulated_by"] and "SIMULATED" in done.err
    assert any("SIMULATED" in w for w in done.document["warnings"])
    again, _, cached = exported(run, tmp_path, "--profile", "tx2", "--precision", "fp16", "--host", "board")
    assert cached == {**engine, "cached": True} and "sending" not in again.err
    shown = prunectl("export", run, "--out", tmp_path, "--profile", "tx2", "--trt", "--host", "board").out
    assert f"on board: {engine['path'].rpartition('/')[0]}" in shown and "building the engine of" in shown


@pytest.mark.parametrize(("release", "profile"), [("32 (release), REVISION: 7.1", "tx2"), ("36 (release), REVISION: 4.0", "orin")])
def test_the_board_decides_the_profile(release, profile, at_the_board, run, tmp_path):
    (at_the_board.root / "etc/nv_tegra_release").write_text(f"# R{release}, GCID: 1, BOARD: generic\n")
    assert exported(run, tmp_path, "--host", "board")[2]["profile"] == profile


def test_the_board_named_in_the_environment_is_taken_where_nothing_else_builds(at_the_board, run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PRUNECTL_JETSON", "board")
    assert exported(run, tmp_path, "--trt")[2]["host"] == "board"


def test_zeros_and_a_free_batch_reach_trtexec(at_the_board, run, tmp_path):
    engine = exported(run, tmp_path, "--profile", "orin", "--sparsity", "2:4", "--dynamic-batch", "--host", "board")[2]
    assert "--sparsity=enable" in engine["command"]
    sizes = {"min": 1, "opt": 8, "max": 8}
    assert [w for w in engine["command"] if "Shapes" in w] == [f"--{which}Shapes=input:{n}x1x28x28" for which, n in sizes.items()]


@pytest.mark.parametrize(
    ("mode", "words"), [("crash-build", "it said:"), ("oom-build", "ran out of memory"), ("garbage-build", "wrote no engine")]
)
def test_a_build_that_fails_is_one_sentence_and_keeps_the_proven_file(mode, words, at_the_board, run, tmp_path):
    at_the_board.set_trtexec(version=8601, mode=mode)
    done = prunectl("export", run, "--out", tmp_path, "--profile", "tx2", "--host", "board", "-q")
    done.refused(5, "board: trtexec, building the engine of model-tx2-fp32.onnx", words)
    assert (tmp_path / "model-tx2-fp32.onnx").is_file()
    assert not list(at_the_board.cache.rglob("*.plan"))


def test_a_board_without_trtexec(at_the_board, run, tmp_path):
    at_the_board.trtexec.unlink()
    prunectl("export", run, "--out", tmp_path, "--profile", "tx2", "--host", "board", "-q").refused(5, "no trtexec at")


def test_a_board_that_does_not_answer(run, sshd, board, tmp_path, monkeypatch):
    with sshd(board) as server:
        monkeypatch.setenv("PRUNECTL_SSH", server.ssh)
    prunectl("export", run, "--out", tmp_path / "out", "--host", "board").refused(5, "nothing listens for ssh there")
    assert not (tmp_path / "out").exists()  # which profile? only the board knows


@pytest.mark.parametrize(
    ("version", "options", "words"),
    [
        (8201, ("--profile", "gpu"), "has TensorRT 8.2.1, which mis-reads files for TensorRT 10.0"),
        (110100, ("--profile", "orin", "--precision", "fp16"), "takes its precision from the file"),
    ],
)
def test_a_tensorrt_that_the_profile_does_not_write_for(version, options, words, at_the_board, run, tmp_path):
    at_the_board.set_trtexec(version=version)
    prunectl("export", run, "--out", tmp_path, *options, "--host", "board", "-q").refused(4, words)
