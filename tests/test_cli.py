"""The command line's manners: one sentence and the right status for every mistake, one JSON document when asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml
from running import Outcome, installed, prunectl, run_folders

from prunectl.errors import ExitStatus

TRAIN = ("train", "resnet8", "fashion-mini")
FIND = ("find-ticket", "resnet8", "fashion-mini")

REFUSED = [
    (("trian",), 2, ["trian", "train"]),
    (("train",), 2, ["MODEL"]),
    (("train", "resnet8"), 2, ["DATASET"]),
    ((*TRAIN, "extra"), 2, ["extra"]),
    ((*TRAIN, "--epoch", "3"), 2, ["--epoch", "--epochs"]),
    ((*TRAIN, "--epochs", "three"), 2, ["--epochs", "integer"]),
    ((*TRAIN, "--epochs", "-1"), 2, ["train.epochs", "-1"]),
    ((*TRAIN, "--seed", "-1"), 2, ["seed", "-1"]),
    (("train", "resnet9", "fashion-mini"), 2, ["resnet9", "resnet8"]),
    (("train", "timm/resnet0", "fashion-mini"), 2, ["timm"]),
    (("train", "torchvision/resnet19", "fashion-mini"), 2, ["resnet19", "resnet18"]),
    (("train", "nets.py", "fashion-mini"), 2, ["nets.py", "file.py:function"]),
    (("train", "nowhere.py:net", "fashion-mini"), 2, ["nowhere.py"]),
    (("train", "resnet8", "fashion-maxi"), 2, ["fashion-maxi", "fashion-mini"]),
    (("train", "resnet8", "./nowhere"), 6, ["./nowhere", "train/"]),
    (("train", "resnet50", "imagenet", "--data-dir", "/nowhere"), 6, ["imagenet", "/nowhere"]),
    ((*TRAIN, "--set", "train.lrr=1"), 2, ["train.lrr", "did you mean train.lr"]),
    ((*TRAIN, "--set", "trian.lr=1"), 2, ["trian", "did you mean train"]),
    ((*TRAIN, "--set", "train.lr"), 2, ["train.lr", "key.path=value"]),
    ((*TRAIN, "--set", "=1"), 2, ["=1", "key.path=value"]),
    ((*TRAIN, "--set", "train.lr=fast"), 2, ["train.lr", "fast", "number"]),
    ((*TRAIN, "--set", "train.lr=[1"), 2, ["train.lr=[1"]),
    ((*TRAIN, "--set", "train.lr.x=1"), 2, ["train.lr.x"]),
    ((*TRAIN, "--set", "train.lr=nan"), 2, ["train.lr", "finite"]),
    ((*TRAIN, "--set", "train=5"), 2, ["train = 5", "section"]),
    ((*TRAIN, "--set", "verb=find-ticket"), 2, ["verb"]),
    ((*TRAIN, "--set", "model.name=resnet20"), 2, ["model.name"]),
    ((*TRAIN, "--set", "data.name=mnist"), 2, ["data.name"]),
    ((*TRAIN, "--set", "model.width=0"), 2, ["model.width"]),
    ((*TRAIN, "--set", "data.image_size=4"), 2, ["data.image_size"]),
    ((*TRAIN, "--set", "data.train_images=999999"), 2, ["data.train_images", "999999", "9000"]),
    ((*TRAIN, "--set", "data.augment=mirror"), 2, ["data.augment", "mirror", "crop-flip"]),
    ((*TRAIN, "--workers", "-1"), 2, ["workers"]),
    ((*TRAIN, "--recipe", "nowhere.yaml"), 2, ["nowhere.yaml", "prunectl list recipes"]),
    ((*TRAIN, "--precision", "bf61"), 2, ["bf61", "bf16"]),
    ((*TRAIN, "--precision", "fp16", "--device", "cpu"), 2, ["fp16", "CUDA"]),
    ((*TRAIN, "--device", "gpu"), 2, ["gpu", "cuda"]),
    ((*TRAIN, "--from", "nowhere"), 2, ["nowhere"]),
    ((*TRAIN, "--resume", "--overwrite"), 2, ["--resume", "--overwrite"]),
    ((*FIND, "--sparsity", "0"), 2, ["sparsity", "0"]),
    ((*FIND, "--sparsity", "1"), 2, ["sparsity", "1"]),
    ((*FIND, "--sparsity", "1.5"), 2, ["sparsity", "1.5"]),
    ((*FIND, "--sparsity", "nan"), 2, ["sparsity", "nan"]),
    ((*FIND, "--sparsity", "half"), 2, ["sparsity", "number"]),
    ((*FIND, "--sparsity", "0.999"), 3, ["0.999", "cannot be met"]),
    ((*FIND, "--target-macs", "0.001"), 3, ["0.001", "cannot be met"]),
    ((*FIND, "--sparsity", "0.5", "--target-macs", "0.5"), 2, ["sparsity", "target_macs"]),
    ((*FIND, "--criterion", "splin"), 2, ["splin", "did you mean spline"]),
    ((*FIND, "--detector", "splin"), 2, ["splin", "did you mean spline"]),
    ((*FIND, "--detector", "epoch"), 2, ["epoch:5"]),
    ((*FIND, "--detector", "epoch:soon"), 2, ["epoch:soon"]),
    ((*FIND, "--detector", "epoch:-1"), 2, ["epoch:-1"]),
    ((*FIND, "--detector", "epoch:nan"), 2, ["epoch:nan"]),
    ((*FIND, "--scope", "local"), 2, ["scope", "layerwise", "global"]),
    ((*FIND, "--weights", "keep"), 2, ["keep", "inherit", "rewind:"]),
    ((*FIND, "--epochs", "5", "--weights", "rewind:5"), 2, ["rewind:5", "5 epochs"]),
    ((*FIND, "--epochs", "5", "--detector", "epoch:6"), 2, ["after 6 epochs", "schedule has 5"]),
    ((*FIND, "--epochs", "5", "--detector", "epoch:2", "--set", "ticket.draws=5"), 2, ["after 6 epochs", "schedule has 5"]),
    ((*FIND, "--probe", "canva"), 2, ["canva", "canvas"]),
    ((*FIND, "--round-to", "some"), 2, ["round_to", "some", "auto"]),
    ((*FIND, "--round-to", "0"), 2, ["round_to", "0"]),
    ((*FIND, "--keep", "["), 2, ["[", "regular expression"]),
    ((*FIND, "--keep", "."), 3, ["--keep", "no layer"]),
    ((*FIND, "--eps", "0"), 2, ["eps"]),
    ((*FIND, "--window", "0"), 2, ["window"]),
    ((*FIND, "--epochs", "0"), 2, ["epochs"]),
    (("list", "modles"), 2, ["modles", "models"]),
    (("show", "nowhere"), 2, ["nowhere"]),
]


def _named(case: tuple[tuple[str, ...], int, list[str]]) -> str:
    return " ".join(case[0])


@pytest.mark.parametrize(("argv", "code", "words"), REFUSED, ids=map(_named, REFUSED))
def test_a_mistake_gets_one_sentence_its_status_and_no_run_folder(argv, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prunectl(*argv).refused(code, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argv", "code", "words"), REFUSED[::6], ids=map(_named, REFUSED[::6]))
def test_with_json_the_same_mistake_is_one_document(argv, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = prunectl(*argv, "--json")
    assert failed.code == code
    assert failed.document.keys() == {"schema", "outcome", "error", "exit"}
    assert (failed.document["outcome"], failed.document["exit"]) == ("error", code)
    assert failed.err == f"error: {failed.document['error']}\n"


def test_a_folder_without_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir(parents=True)
    prunectl("train", "resnet8", tmp_path / "photos", "--out", tmp_path / "runs").refused(6, str(tmp_path / "photos"))
    assert run_folders(tmp_path / "runs") == []


def test_out_below_a_file_and_on_a_read_only_place(tmp_path):
    """Permissions do not stop root, who runs tests in containers; a file as parent and /proc stop everyone."""
    (tmp_path / "file").write_text("")
    prunectl(*TRAIN, "--epochs", "1", "--out", tmp_path / "file").refused(2, str(tmp_path / "file"), "--out")
    prunectl(*TRAIN, "--epochs", "1", "--out", tmp_path / "file" / "deeper").refused(2, "--out")
    prunectl(*TRAIN, "--epochs", "1", "--out", "/proc/runs").refused(2, "/proc/runs", "--out")


def test_the_words_of_a_real_process(tmp_path):
    """Nothing is said beside the sentence: no warning of a library, no traceback, no exit code of Python's own."""
    installed(*FIND, "--sparsity", "0.999", "--set", "data.train_images=200", "--out", tmp_path / "runs").refused(3, "0.999")
    installed("train", "resnet9", "fashion-mini", "--out", tmp_path / "runs").refused(2, "did you mean")


def test_help_version_and_no_argument():
    assert prunectl("--version").out.startswith("prunectl ")
    assert prunectl("--version").code == 0
    assert "find-ticket" in prunectl("--help").out
    bare = prunectl()
    assert (bare.code, bare.err) == (2, "") and "find-ticket" in bare.out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("prunectl find-t", {"find-ticket"}),
        ("prunectl find-ticket resnet", {"resnet8", "resnet18", "resnet20", "resnet50"}),
        ("prunectl train resnet8 fashion", {"fashion-mini", "fashion-mnist"}),
        ("prunectl find-ticket resnet8 cifar10 --criterion spline-", {"spline-published", "spline-signed"}),
    ],
)
def test_a_shell_completes_names(line, offered):
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_PRUNECTL_COMPLETE": "complete_bash"}
    done = installed(env=words)
    assert (done.code, set(done.out.split()), done.err) == (0, offered, "")


def test_the_completion_script_can_be_shown():
    done = installed("--show-completion", "bash", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert done.code == 0 and done.err == "" and "PRUNECTL_COMPLETE" in done.out, done


@pytest.mark.parametrize("verb", ["train", "find-ticket", "list", "show", "demo"])
def test_every_verb_has_help_and_takes_json(verb):
    shown = prunectl(verb, "--help")
    assert shown.code == 0 and "--json" in shown.out


@pytest.mark.parametrize("verb", ["train", "find-ticket", "show", "demo", "list"])
def test_every_verb_takes_the_common_switches(verb):
    for switch in ("--quiet", "--verbose", "--no-progress"):
        assert switch in prunectl(verb, "--help").out, switch


def test_list_as_text_and_as_json():
    text, document = prunectl("list"), prunectl("list", "--json").document
    assert document["schema"] == 1 and document["verb"] == "list"
    for kind in ("models", "datasets", "criteria", "detectors", "recipes"):
        assert document[kind] and all(document[kind].values()), kind
        assert all(name in text.out for name in document[kind])
    only = prunectl("list", "models", "--json").document
    assert "datasets" not in only and only.keys() >= {"run", "outcome", "model", "dataset", "seed", "wall_s", "versions", "warnings"}


def test_list_marks_nothing_up():
    """Help texts are shown letter by letter: brackets and colons are no markup."""
    assert all(line.strip() for line in prunectl("list", "models").out.splitlines())


def test_print_recipe_is_yaml_and_with_json_one_document():
    printed, document = prunectl(*FIND, "--print-recipe"), prunectl(*FIND, "--print-recipe", "--json").document
    assert printed.code == 0 and printed.err == ""
    assert yaml.safe_load(printed.out) == document


def test_a_closed_pipe_is_met_in_silence():
    command = f"{sys.executable} -m prunectl list | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_a_closed_or_full_stdout(tmp_path):
    def bash(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", f"{sys.executable} -m prunectl {command}"], capture_output=True, text=True, timeout=60)

    assert bash("list models >&-").returncode == 0
    for argv in ("list models --json", "train resnet9 fashion-mini --json"):
        full = bash(f"{argv} >/dev/full")
        assert full.returncode == 2 and len(full.stderr.splitlines()) == 1 and full.stderr.startswith("error: ")


def test_every_status_is_used_by_an_error_class():
    from prunectl import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PrunectlError)]
    assert {c.status for c in classes} | {ExitStatus.OK} == set(ExitStatus)


def test_an_unforeseen_error_is_one_sentence_with_a_way_to_the_traceback(tmp_path):
    """A user's network that breaks in a way nobody foresaw."""
    (tmp_path / "nets.py").write_text("import os\ndef net():\n    os.chdir('/nowhere/at/all')\n")
    failed = prunectl("train", f"{tmp_path}/nets.py:net", "fashion-mini", "--out", tmp_path / "runs")
    failed.refused(2, "nets.py:3", "FileNotFoundError")


def test_json_survives_a_pipe_to_a_parser(tmp_path):
    argv = f"{sys.executable} -m prunectl train resnet9 fashion-mini --json --out {tmp_path} 2>/dev/null | {sys.executable} -m json.tool"
    done = subprocess.run(["bash", "-c", argv], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["exit"] == 2


def test_what_a_users_network_prints_is_no_part_of_the_document(tmp_path):
    lines = ("import os", "from torch import nn", "print('one')", "os.system('echo two')", "def net(num_classes):", " print('three')")
    made = " return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(10816, num_classes))"
    (tmp_path / "nets.py").write_text("\n".join((*lines, made)))
    done = installed("find-ticket", f"{tmp_path}/nets.py:net", "fashion-mini", "--dry-run", "--json", "-q", "--out", tmp_path / "runs")
    assert done.document["outcome"] == "dry-run" and all(word in done.err for word in ("one", "two", "three"))


def test_refusals_come_before_torch():
    """Names and values are checked in well under the seconds that importing torch takes."""
    started = time.monotonic()
    assert installed(*FIND, "--sparsity", "2").code == 2
    code = "import sys; from prunectl.cli.process import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for argv in ([*FIND, "--sparsity", "2"], [*FIND, "--criterion", "x"], ["train", "resnet9", "mnist"]):
        assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, timeout=60).returncode == 0, argv
    assert time.monotonic() - started < 60


def test_outcome_refuses_what_it_should():
    """The helper itself: two lines on stderr are not one sentence."""
    with pytest.raises(AssertionError):
        Outcome(2, "", "error: a\nerror: b\n").refused(2)
