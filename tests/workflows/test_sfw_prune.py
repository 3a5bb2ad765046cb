"""sfw-prune through the real command line: trained once inside its sets, pruned once to every ratio, resumed bit for bit."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from running import comparable, forked, only_run, prunectl, run_folders

import prunectl as library
from prunectl import data, models
from prunectl.console import Console
from prunectl.pruning.constraints import from_dict
from prunectl.pruning.fade import Target
from prunectl.pruning.oneshot import global_masks
from prunectl.recipe import resolve
from prunectl.rundir import RunDir
from prunectl.training.loop import Step
from prunectl.training.schedule import learning_rate
from prunectl.workflows.folder import Options
from prunectl.workflows.sfw_prune import fade, prepared, rate_of, start_inside

VERB = ("sfw-prune", "resnet8", "fashion-mini")
SMALL = ("--set", "model.width=0.5", "--set", "data.train_images=400", "--set", "train.batch_size=50", "--precision", "fp32")
TINY = (*VERB, *SMALL, "--epochs", "2", "--bn-recal", "2")
NM = (*TINY, "--constraint", "nm", "--sfw-init", "--set", "sfw.fade=0.5", "--sparsity", "0.9", "--sparsity", "0.5")
ONE_IMAGE = 0.05 + 1e-9  # percent: of 2,000 test images one may fall to the other side when sums are taken in another order


@pytest.fixture(scope="module")
def nm(tmp_path_factory):
    """The run folder and the printed document of an N:M run with SFW-Init."""
    out = tmp_path_factory.mktemp("nm")
    done = prunectl(*NM, "--out", out, "--json")
    assert done.code == 0, done.err
    return only_run(out), done.document


def _test_accuracy(model: torch.nn.Module) -> float:
    images = data.load("fashion-mini").eval_batches("test", batch_size=500)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in images])
    return 100 * right.double().mean().item()


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Convolution and linear weights by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


# -- what a run says and leaves ---------------------------------------------------------------------------------------


def test_the_result_has_the_promised_keys_and_exact_counts(nm):
    run, document = nm
    total = sum(w.numel() for w in _weights(library.load(run)).values())
    assert document == {**json.loads((run / "result.json").read_text()), "run": str(run), "saved": str(run / "model")}
    assert {"schema", "verb", "run", "outcome", "model", "dataset", "seed", "wall_s", "versions", "warnings"} <= document.keys()
    assert [set(row) for row in document["sweep"]] == 2 * [{"sparsity", "nonzero", "total", "accuracy_raw", "accuracy_bn_recalibrated"}]
    assert [(row["sparsity"], row["nonzero"], row["total"]) for row in document["sweep"]] == [
        (share, total - round(share * total), total) for share in (0.5, 0.9)
    ]
    assert set(document["pattern"]) == {"n", "m", "accuracy_raw", "accuracy_bn_recalibrated"}
    assert (document["pattern"]["n"], document["pattern"]["m"], document["constraint"]) == (2, 4, "nm")
    assert document["on_l2_ball"] == ["conv1.weight"]  # one input channel
    assert document["fw_gap"] > 0


def test_accuracies_are_those_of_the_saved_network(nm):
    run, document = nm
    model = library.load(run)
    assert document["accuracy"] == {
        "dense": pytest.approx(_test_accuracy(model), abs=ONE_IMAGE),
        "dense_top5": pytest.approx(50, abs=50),
    } | {"split": "test"}
    weights = _weights(model)
    smallest = torch.cat([w.flatten() for w in weights.values()]).abs().argsort(stable=True)[: document["sweep"][0]["nonzero"]]
    gone = torch.zeros(document["sweep"][0]["total"])
    gone[smallest] = 1
    for w, part in zip(weights.values(), gone.split([w.numel() for w in weights.values()]), strict=True):
        w[part.view(w.shape) == 1] = 0
    assert document["sweep"][0]["accuracy_raw"] == pytest.approx(_test_accuracy(model), abs=ONE_IMAGE)


def test_files_of_the_sweep(nm):
    run, document = nm
    with (run / "sweep.csv").open() as f:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)] == document["sweep"]
    assert (run / "sweep.png").read_bytes().startswith(b"\x89PNG")
    scales = json.loads((run / "sfw_init.json").read_text())["scales"]
    assert scales.keys() == dict(library.load(run).named_parameters()).keys()
    assert min(scales.values()) >= 0 and len(set(scales.values())) > 2


def test_each_epoch_logs_where_the_steps_and_the_weights_stand(nm):
    run, document = nm
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2] and rows[-1]["fw_gap"] == document["fw_gap"]
    assert all(0 < r["active_fraction"] <= 1 and r["clamped"] >= 0 and r["screened"] == 0 for r in rows)
    with (run / "weights.csv").open() as f:
        logged = list(csv.DictReader(f))
    assert json.loads((run / "weights.json").read_text())["rows"] == [
        {k: v if k == "layer" else int(v) for k, v in r.items()} for r in logged
    ]
    weights = _weights(library.load(run))
    assert [(r["epoch"], r["layer"]) for r in logged] == [(str(e), name) for e in (1, 2) for name in weights]
    for row in logged[len(weights) :]:
        magnitudes = weights[row["layer"]].abs().numpy()
        for exponent in range(1, -11, -1):
            assert int(row[f"above_1e{exponent}"]) == (magnitudes > np.float32(10.0**exponent)).sum()


def test_the_table_names_the_ball_and_the_sweep(tmp_path, nm):
    shutil.copytree(nm[0], tmp_path / nm[0].name)
    again = prunectl(*NM, "--out", tmp_path)
    assert again.code == 0 and "is finished" in again.out and "batch norm re-calibrated" in again.out and "2:4" in again.out


def test_group_k_support_removes_channels_for_good(tmp_path):
    done = prunectl(*TINY, "--constraint", "group-k-support", "--sparsity", "0.5", "--epochs", "1", "--out", tmp_path, "--json")
    assert done.code == 0 and "on an L2 ball, because they have no filters: fc.weight" in done.err
    tickets = done.document["channel_tickets"]
    assert [t["channels"] for t in tickets] == [0.25, 0.5, 0.75] and done.document["pattern"] is None
    costs = [(done.document["params"], done.document["macs"]), *((t["params"], t["macs"]) for t in tickets)]
    assert all(after[0] < before[0] and after[1] < before[1] for before, after in pairwise(costs))
    for t in tickets:
        small = library.load(t["saved"])
        assert sum(p.numel() for p in small.parameters()) == t["params"]
        assert t["accuracy_reconstructed"] == pytest.approx(_test_accuracy(small), abs=ONE_IMAGE)


# -- export of any ratio ----------------------------------------------------------------------------------------------


def _kernels(path: str) -> list[np.ndarray]:
    """Weights of the file's convolutions and linear layers."""
    graph = onnx.load(path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    used = [n.input[1] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    return [stored[name] for name in used]


def test_export_prunes_to_a_ratio_of_the_sweep(nm):
    run, document = nm
    done = prunectl("export", run, "--sparsity", "0.5", "--profile", "tx2", "--json")
    assert done.code == 0, done.err
    (artifact,) = done.document["artifacts"]
    kernels, row = _kernels(artifact["path"]), document["sweep"][0]
    assert (sum(map(np.count_nonzero, kernels)), sum(k.size for k in kernels)) == (row["nonzero"], row["total"])
    assert artifact["accuracy"] == pytest.approx(row["accuracy_bn_recalibrated"], abs=2 * ONE_IMAGE)
    assert "50.0 %" in done.document["zeros"]
    recorded = json.loads(Path(artifact["record"]).read_text())["provenance"]["pruning"]
    assert (recorded["sparsity"], recorded["nonzero"], recorded["weights"]) == ("0.5", row["nonzero"], row["total"])
    prunectl("export", run, "--sparsity", "2:4").refused(2, "cpu", "--profile gpu or orin or rtx")


def test_export_prunes_to_the_pattern(nm):
    done = prunectl("export", nm[0], "--sparsity", "2:4", "--profile", "orin", "--json")
    assert done.code == 0, done.err
    (artifact,) = done.document["artifacts"]
    fitting = [k for k in _kernels(artifact["path"]) if k.shape[1] % 4 == 0]
    assert len(fitting) > 5
    for k in fitting:
        assert np.count_nonzero(k.reshape(k.shape[0], -1, 4, *k.shape[2:]), axis=2).max() == 2
    assert artifact["accuracy"] == pytest.approx(nm[1]["pattern"]["accuracy_bn_recalibrated"], abs=2 * ONE_IMAGE)


def test_fading_takes_norm_from_what_will_be_removed(tmp_path):
    """The same training with and without: the weights that 90 % removes carry a smaller part of the norm."""
    removed = {}
    for strength in ("0", "8"):
        done = prunectl(*TINY, "--constraint", "none", "--sparsity", "0.9", "--set", f"sfw.fade={strength}", "--out", tmp_path / strength)
        assert done.code == 0, done.err
        magnitudes = torch.cat([w.abs().flatten() for w in _weights(library.load(only_run(tmp_path / strength))).values()]).sort().values
        removed[strength] = (magnitudes[: int(0.9 * len(magnitudes))].norm() / magnitudes.norm()).item()
    assert removed["8"] < 0.95 * removed["0"], removed


# -- resume -----------------------------------------------------------------------------------------------------------


# before the first checkpoint is whole (SFW-Init runs again), within the second epoch's files, and within the sweep's
@pytest.mark.parametrize("write", [5, *(pytest.param(late, marks=pytest.mark.slow) for late in (16, 21))])
def test_killed_and_resumed_is_bit_for_bit_the_same(write, nm, tmp_path):
    died = forked(*NM, "--out", tmp_path / "runs", log=tmp_path / "log", die_at_write=write)
    assert died.code == 137, died.out
    resumed = forked(*NM, "--out", tmp_path / "runs", "--resume", log=tmp_path / "log")
    assert resumed.code == 0, resumed.out
    run = only_run(tmp_path / "runs")
    assert comparable(run) == comparable(nm[0])
    for name in ("weights.csv", "sweep.csv", "sfw_init.json"):
        assert (run / name).read_bytes() == (nm[0] / name).read_bytes()


def test_counters_and_momentum_survive_a_checkpoint(tmp_path):
    done = prunectl(*TINY, "--sparsity", "0.5", "--set", "train.lr=300", "--set", "train.schedule=constant", "--out", tmp_path)
    assert done.code == 0, done.err
    run = only_run(tmp_path)
    undisturbed = comparable(run)
    assert undisturbed["metrics"][0]["clamped"] > 0, "a rate at which steps reach their vertex"
    (run / "result.json").unlink()
    for path in run.glob("checkpoints/epoch-00002.*"):
        path.unlink()
    assert (
        prunectl(
            *TINY, "--sparsity", "0.5", "--set", "train.lr=300", "--set", "train.schedule=constant", "--out", tmp_path, "--resume"
        ).code
        == 0
    )
    assert comparable(run) == undisturbed


# -- the rival --------------------------------------------------------------------------------------------------------


def test_without_a_constraint_it_is_train_and_a_sweep(tmp_path):
    pair = ("resnet8", "fashion-mini", *SMALL, "--epochs", "1", "--out", tmp_path)
    sgd = ("--set", "train.lr=0.1", "--set", "train.weight_decay=5e-4", "--set", "train.schedule=cosine", "--set", "train.warmup_epochs=0")
    trained = prunectl("train", *pair, *sgd, "--json").document
    swept = prunectl("sfw-prune", *pair, "--constraint", "none", "--set", "train.warmup_epochs=0", "--sparsity", "0.5", "--json").document
    assert swept["fw_gap"] is None and swept["pattern"] is None and swept["on_l2_ball"] == []
    theirs, ours = (Path(d["saved"], "model.safetensors").read_bytes() for d in (trained, swept))
    assert ours == theirs
    later = ("--constraint", "none", "--epochs", "0", "--from", trained["run"], "--sparsity", "0.5", "--bn-recal", "0", "--json")
    swept_later = prunectl("sfw-prune", *pair, *later).document
    assert swept_later["accuracy"]["dense"] == trained["accuracy"]["top1"]
    assert swept_later["sweep"][0]["accuracy_raw"] == swept["sweep"][0]["accuracy_raw"]
    assert swept_later["sweep"][0]["accuracy_bn_recalibrated"] is None


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    (("--k-fraction", "0"), 2, ["k_fraction", "0.0", "(0, 1]"]),
    (("--k-fraction", "2"), 2, ["k_fraction", "2.0", "(0, 1]"]),
    (("--tau", "-1"), 2, ["tau", "-1", "greater than 0"]),
    (("--tau", "1e308"), 2, ["tau", "1e+308", "less than"]),
    (("--set", "train.lr=1e300"), 2, ["train.lr", "1e300", "less than"]),
    (("--sfw-init", "--set", "train.batch_size=2"), 2, ["--sfw-init", "batch here has 2"]),
    (("--sparsity", "0.9999999"), 3, ["0.9999999", "leave none of the"]),
    (("--sparsity", "0.9", "--sparsity", "0.0000001"), 3, ["1e-07", "remove none of the"]),
    (("--set", "sfw.p=foo"), 2, ["sfw.p", "'foo'", "or inf"]),
    (("--set", "ticket.sparsity=0.5"), 2, ["ticket.sparsity", "find-ticket only"]),
    (("--set", "train.distill=0.5"), 2, ["train.distill", "find-ticket only"]),
    (("--n", "5", "--m", "4"), 2, ["n = 5 of m = 4"]),
    (("--n", "4"), 2, ["n = 4 of m = 4"]),
    (("--sparsity", "1.0"), 2, ["sparsity", "1.0"]),
    (("--sparsity", "0.5", "--sparsity", "0"), 2, ["sparsity", "0"]),
    (("--set", "train.momentum=1"), 2, ["momentum", "less than 1"]),
    (("--set", "train.lr=2", "--set", "sfw.rescale=none"), 2, ["lr = 2", "rescale"]),
    (("--set", "train.weight_decay=5e-4"), 2, ["weight_decay", "constraint none"]),
    (("--set", "train.nesterov=true"), 2, ["nesterov", "constraint none"]),
    (("--set", "sfw.p=0.5", "--constraint", "lp"), 2, ["sfw.p", "0.5"]),
    (("--constraint", "k-spars"), 2, ["k-spars", "did you mean k-sparse"]),
    (("--scope", "some"), 2, ["scope", "weights", "all"]),
    (("--bn-recal", "-1"), 2, ["bn_recal", "-1"]),
    (("--set", "sfw.taw=1"), 2, ["sfw.taw", "did you mean sfw.tau"]),
    (("--constraint", "nm", "--m", "100"), 3, ["nm", "divisible by 100"]),
    (("--constraint", "k-sparse", "--n", "2", "--m", "100"), 3, ["2:100", "divisible by 100"]),  # before training, not after it
]


@pytest.mark.parametrize(("options", "code", "words"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, tuple) else None)
def test_refused_in_one_sentence(options, code, words, tmp_path):
    prunectl(*TINY, *options, "--out", tmp_path).refused(code, *words)
    assert run_folders(tmp_path) == []


def test_what_does_nothing_or_leaves_nothing_is_said(tmp_path):
    """A radius so small that the first steps put every weight at 0."""
    odd = ("--tau", "1e-300", "--constraint", "lp", "--k-fraction", "0.5", "--set", "sfw.sparsity=0.5", "--set", "sfw.p=.inf")
    said = prunectl(*TINY, *odd, "--out", tmp_path, "--json").document["warnings"]
    assert any("--k-fraction does nothing with constraint lp" in w for w in said)
    assert any("more weights at zero" in w for w in said)
    idle = ("--tau", "3", "--set", "sfw.p=3", "--set", "sfw.channels=0.5", "--constraint")
    for constraint, flags in (("none", {"--tau", "sfw.p", "sfw.channels"}), ("nm", {"sfw.p", "sfw.channels"})):
        said = prunectl(*TINY, *idle, constraint, "--out", tmp_path, "--dry-run", "--json").document["warnings"]
        assert {w.partition(" does nothing")[0] for w in said if "does nothing" in w} == flags


def test_a_share_of_no_channel_is_refused_before_training_and_one_out_of_reach_is_said(tmp_path):
    asked = (*TINY, "--constraint", "group-k-support", "--out", tmp_path / "runs", "--set")
    prunectl(*asked, "sfw.channels=[0.5,0.001]").refused(3, "sfw.channels 0.001", "none of the", "channels that may go")
    said = prunectl(*asked, "sfw.channels=[0.99]", "--json").document
    (row,) = said["channel_tickets"]
    assert row["removed"] < 0.9 and any(f"a share of {row['removed']:.3f} can go at most" in w for w in said["warnings"])


def test_nm_on_a_network_of_odd_widths_is_unsatisfiable(tmp_path):
    net = tmp_path / "nets.py"
    net.write_text(
        "from torch import nn\n"
        "def odd(num_classes, in_channels):\n"
        "    layers = nn.Conv2d(in_channels, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    prunectl("sfw-prune", f"{net}:odd", "fashion-mini", "--constraint", "nm", "--out", tmp_path / "runs").refused(3, "nm", "divisible by 4")


PARTLY = """
from torch import nn

class Partly(nn.Module):
    def __init__(self, c, n):
        super().__init__()
        self.frozen, self.body = nn.Conv2d(c, 16, 3, stride=4).requires_grad_(False), nn.Conv2d(16, 16, 3)
        self.out, self.spare = nn.Linear(16, n), nn.Linear(16, n)

    def forward(self, x):
        return self.out(self.body(self.frozen(x).relu()).relu().mean((2, 3)))

def net(num_classes, in_channels):
    return Partly(in_channels, num_classes)
"""


def test_frozen_weights_stay_and_unused_ones_do_no_harm(tmp_path):
    (tmp_path / "nets.py").write_text(PARTLY)
    few = ("--set", "data.train_images=200", "--set", "train.batch_size=50", "--epochs", "2", "--bn-recal", "0", "--sparsity", "0.5")
    done = prunectl("sfw-prune", f"{tmp_path}/nets.py:net", "fashion-mini", *few, "--sfw-init", "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done
    start = models.build(f"{tmp_path}/nets.py:net", num_classes=10, in_channels=1, image_size=28, seed=0)
    assert torch.equal(library.load(done.document["run"]).frozen.weight, start.frozen.weight)


# -- settings ---------------------------------------------------------------------------------------------------------


def _recipe(**given):
    return resolve("sfw-prune", model="resnet8", dataset="fashion-mini", sets=["model.width=0.5", "data.train_images=400"], **given)


@pytest.mark.parametrize("pair", [(m, d) for m in ("resnet18", "vgg16") for d in ("cifar10", "tiny-imagenet")])
def test_the_published_recipes(pair):
    recipe = resolve("sfw-prune", model=pair[0], dataset=pair[1])
    t = recipe.train
    assert (t.epochs, t.batch_size, t.momentum, t.weight_decay) == (180, 128, 0.9, 0.0)
    assert (recipe.sfw.constraint, recipe.sfw.tau, recipe.sfw.k_fraction, recipe.sfw.dynamic_lr) == ("k-sparse", 15.0, None, True)
    rates = [learning_rate(e / 180, lr=t.lr, schedule=t.schedule, milestones=t.milestones) for e in range(180)]
    assert [e + 1 for e in range(1, 180) if rates[e] != rates[e - 1]] == [61, 121] and rates[0] == 1.0
    assert recipe.sfw.sparsity == tuple([i / 10 for i in range(1, 10)] + [i / 100 for i in range(91, 100)])


def test_the_step_settings_follow_the_constraint():
    cifar = {"model": "resnet18", "dataset": "cifar10"}
    sgd = resolve("sfw-prune", **cifar, overrides={"sfw.constraint": "none"}).train
    assert (sgd.lr, sgd.weight_decay, sgd.schedule, sgd.epochs) == (0.1, 5e-4, "cosine", 180)
    assert resolve("sfw-prune", **cifar, sets=["sfw.constraint=none", "train.lr=0.2"]).train.lr == 0.2
    assert resolve("sfw-prune", **cifar, overrides={"sfw.constraint": "k_support"}).train.lr == 1.0
    bare = resolve("sfw-prune", model="alexnet", dataset="svhn").train
    assert (bare.epochs, bare.lr, bare.milestones) == (180, 1.0, (1 / 3, 2 / 3))


def _session(tmp_path, recipe):
    return prepared(recipe, RunDir(tmp_path / "run"), Options(out=tmp_path), Console(verbosity=-1))


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_every_ratio_fades_in_turn_however_short_the_epochs(tmp_path, steps):
    """Every fifth step of the run, whatever the number of steps in an epoch."""
    recipe = _recipe(overrides={"train.epochs": 30, "sfw.fade": 1.0, "sfw.sparsity": (0.3, 0.6, 0.9)})
    session, sets = _session(tmp_path, recipe)
    asked: list[float] = []

    def target(ratio: float) -> Target:
        return lambda weights: asked.append(ratio) or global_masks(weights, ratio)

    removed = [target(ratio) for ratio in sets.settings.sparsity]
    for epoch, index in product(range(30), range(1, steps + 1)):
        fade(session, sets.settings, removed, Step(epoch + index / steps, index, steps, 50, None))
    assert len(asked) == steps * 30 // 5 and asked[:4] == [0.6, 0.9, 0.3, 0.6]


def test_the_rate_follows_the_losses_logged_so_far(tmp_path):
    recipe = _recipe(overrides={"train.epochs": 60, "train.lr": 0.98, "train.schedule": "multistep"})
    session, sets = _session(tmp_path, recipe)
    rate = rate_of(session, sets.settings)
    session.rows = [{"train_loss": 1 / (i + 1)} for i in range(24)]
    assert rate(0.3) == 0.98  # not yet
    session.rows += [{"train_loss": 0.01}]
    assert rate(0.3) == pytest.approx(0.98 * 1.06)
    session.rows += [{"train_loss": 5.0}] * 5
    assert rate(0.5) == pytest.approx(0.98 * 0.1 * 1.06 * 0.7)
    plain = recipe.sfw.model_copy(update={"rescale": "none"})
    session.rows = session.rows[:25]
    assert rate_of(session, plain)(0.3) == 1.0  # 1.0388 would step past the vertex


@pytest.mark.parametrize("kind", ["k-sparse", "k-support", "group-k-support", "nm", "lp"])
def test_every_set_has_the_diameter_of_the_untouched_network_and_training_starts_inside(kind, tmp_path):
    recipe = _recipe(overrides={"sfw.constraint": kind, "sfw.tau": 0.25})
    session, sets = _session(tmp_path, recipe)
    before = {name: p.detach().clone() for name, p in session.state.model.named_parameters()}
    start_inside(session, sets)
    moved = 0
    for name, p in session.state.model.named_parameters():
        constraint = sets.plan.sets[name]
        assert constraint.diameter(p.shape) == pytest.approx(2 * 0.25 * (before[name].norm().item() or 1.0), rel=1e-6)
        assert constraint.gauge(p) <= 1 + 1e-6  # float32 rounding of the shrink
        assert from_dict(constraint.to_dict()) == constraint
        moved += not torch.equal(p, before[name])
    assert moved > 0, "sets this small leave some weights outside"


def test_a_dry_run_writes_nothing_and_names_the_ball(tmp_path):
    done = prunectl(*NM, "--dry-run", "--out", tmp_path)
    assert done.code == 0 and "conv1.weight" in done.out and "nothing was written" in done.out
    assert run_folders(tmp_path) == []
