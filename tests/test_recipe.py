"""Settings: who wins, what is refused and how, and what decides a run's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from running import prunectl

from prunectl.data import datasets
from prunectl.errors import UsageError
from prunectl.models.names import resolve as known_model
from prunectl.pruning.criteria import criteria
from prunectl.pruning.detectors import parse
from prunectl.recipe import Recipe, read_back, resolve, validated
from prunectl.shipped import known_recipes, shipped

FIND = ("find-ticket", "resnet8", "fashion-mini")


def _find(**given) -> Recipe:
    return resolve("find-ticket", model="resnet8", dataset="fashion-mini", **given)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


# -- shipped recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n in known_recipes() if not n.startswith("bench/")))  # those are a device's settings
def test_a_shipped_recipe_parses_and_every_name_in_it_resolves(name):
    verb, _, pair = name.partition("/")
    dataset = next(d for d in sorted(datasets.names(), key=len, reverse=True) if pair.endswith(f"-{d}"))
    model = pair.removesuffix(f"-{dataset}")
    recipe = resolve(verb, model=model, dataset=dataset)
    by_file = resolve(verb, model=model, dataset=dataset, file=shipped("recipes") / f"{name}.yaml")
    assert recipe == by_file
    assert known_model(model).source == "prunectl"
    if recipe.ticket:
        parse(recipe.ticket.detector)
        assert recipe.ticket.criterion in criteria.help()
    assert known_recipes()[name], "the first line is a comment that says what it is"


def test_there_is_a_recipe_for_every_pair_of_the_paper():
    pairs = {f"{m}-{d}" for m in ("preresnet-101", "vgg16") for d in ("cifar10", "cifar100")} | {"resnet18-imagenet", "resnet50-imagenet"}
    pairs |= {f"{m}-{d}" for m in ("resnet8", "resnet20", "resnet18", "vgg16") for d in ("fashion-mnist", "fashion-mini")}
    for verb in ("train", "find-ticket"):
        assert {f"{verb}/{pair}" for pair in pairs} <= set(known_recipes())


@pytest.mark.parametrize(("pair", "epochs"), [(("vgg16", "cifar10"), 160), (("resnet50", "imagenet"), 90)])
def test_the_papers_schedules(pair, epochs):
    for verb in ("train", "find-ticket"):
        assert resolve(verb, model=pair[0], dataset=pair[1]).train.epochs == epochs


def test_without_a_recipe_the_defaults_hold():
    recipe = resolve("train", model="alexnet", dataset="svhn")
    assert recipe.train == Recipe.model_fields["train"].default


# -- precedence ------------------------------------------------------------------------------------------------------


def test_command_line_over_file_over_defaults(tmp_path):
    file = _file(tmp_path, "train: {lr: 0.3, epochs: 7, batch_size: 64}")
    recipe = _find(file=file, overrides={"train.epochs": 5}, sets=["train.batch_size=32", "train.weight_decay=1e-3"])
    t = recipe.train
    assert (t.lr, t.epochs, t.batch_size, t.weight_decay, t.momentum) == (0.3, 5, 32, 1e-3, 0.9)


def test_the_words_of_the_command_win_over_the_file(tmp_path):
    """A printed recipe is forked for another pair or verb by naming it."""
    printed = _file(tmp_path, _find().to_yaml())
    other = resolve("train", model="resnet20", dataset="fashion-mnist", file=printed)
    assert (other.verb, other.model.name, other.data.name) == ("train", "resnet20", "fashion-mnist")


@pytest.mark.parametrize("how", ["overrides", "sets"])
def test_a_budget_on_the_command_line_replaces_the_files(how):
    given = {"overrides": {"ticket.target_macs": 0.3}} if how == "overrides" else {"sets": ["ticket.target_macs=0.3"]}
    ticket = _find(**given).ticket
    assert ticket is not None and (ticket.sparsity, ticket.target_macs) == (None, 0.3)


def test_two_budgets_on_the_command_line_are_refused():
    with pytest.raises(UsageError, match="sparsity and target_params"):
        _find(overrides={"ticket.sparsity": 0.5}, sets=["ticket.target_params=0.5"])


def test_a_files_model_and_data_settings_are_kept(tmp_path):
    recipe = _find(file=_file(tmp_path, "model: {width: 0.5}\ndata: {train_images: 100}"))
    assert (recipe.model.width, recipe.data.train_images) == (0.5, 100)


def test_extends_takes_a_shipped_recipe_as_its_base(tmp_path):
    recipe = _find(file=_file(tmp_path, "extends: train/resnet8-fashion-mini\ntrain: {lr: 0.01}"))
    base = resolve("train", model="resnet8", dataset="fashion-mini")
    assert recipe.train == base.train.model_copy(update={"lr": 0.01})


def test_a_budget_in_a_file_replaces_that_of_its_base(tmp_path):
    ticket = _find(file=_file(tmp_path, "extends: find-ticket/resnet8-fashion-mini\nticket: {target_macs: 0.4}")).ticket
    assert ticket and (ticket.sparsity, ticket.target_macs) == (None, 0.4)


def test_what_only_tickets_read_is_left_out_of_a_training(tmp_path):
    file = _file(tmp_path, "train: {distill: 0.5, lr: 0.3}\nticket: {rho: 0.1}")
    assert resolve("train", model="resnet8", dataset="fashion-mini", file=file).train.distill == 0
    assert _find(file=file).train.distill == 0.5


def test_global_scope_compares_mean_scores_unless_told_otherwise():
    assert _find().ticket.pooling == "raw"
    assert _find(overrides={"ticket.scope": "global"}).ticket.pooling == "mean"
    assert _find(overrides={"ticket.scope": "global"}, sets=["ticket.pooling=raw"]).ticket.pooling == "raw"


def test_a_section_set_as_a_whole_leaves_what_is_set_in_it():
    assert _find(sets=["train.lr=0.5", "train={}"], overrides={"train.epochs": 6}).train.epochs == 6


def test_set_reads_yaml_values():
    t = _find(sets=["train.milestones=[0.3, 0.6]", "train.nesterov=true", "train.ema=null", "train.lr=1e-2"]).train
    assert (t.milestones, t.nesterov, t.ema, t.lr) == ((0.3, 0.6), True, None, 0.01)


def test_dashes_and_underscores_are_equal_in_keys_and_names():
    assert _find(sets=["train.batch-size=32"]) == _find(sets=["train.batch_size=32"])
    one, two = (prunectl("train", m, d, "--print-recipe").out for m, d in (("vgg16", "fashion-mini"), ("VGG16", "fashion_mini")))
    assert one == two
    assert _find(sets=["ticket.criterion=BN_scale", "ticket.detector=Epoch:2"]) == _find(
        sets=["ticket.criterion=bn-scale", "ticket.detector=epoch:2"]
    )


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lrr: 1}", "train.lrr.*did you mean train.lr"),
        ("trian: {lr: 1}", "trian.*did you mean train"),
        ("ticket: {sparsty: 0.5}", "ticket.sparsty.*did you mean ticket.sparsity"),
        ("ticket: {zzzzzzzz: 0.5}", "ticket.zzzzzzzz.*known: .*sparsity"),
        ("train: 5", "train = 5.*section"),
        ("ticket: 5", "ticket = 5.*section"),
        ("model: resnet20", "model = 'resnet20'.*section"),
        ("data: [1]", r"data = \[1\].*section"),
        ("- a\n- b", "sections.*list"),
        ("just text", "sections.*str"),
        ("a: [", "not YAML"),
        ("train: {milestones: [0.5, 0.2]}", "milestones.*increasing"),
        ("train: {milestones: [80, 120]}", "milestones.*between 0 and 1"),
        ("train: {epochs: 1.5}", "train.epochs = 1.5"),
        ("ticket: {window: 99999999999999999999}", "ticket.window"),
        ("train: {lr: .nan}", "train.lr.*finite"),
        ("train: {lr: .inf}", "train.lr.*finite"),
        ("ticket: {round_to: 8.5}", "ticket.round_to = 8.5: must be auto"),
        ("extends: train/nothing-here", "nothing-here.*prunectl list recipes"),
        ("extends: [1]", "extends"),
        ("extends: ../tests/../recipes/train/resnet8-fashion-mini", "no shipped recipe"),
    ],
)
def test_a_mistake_in_a_file_names_its_key_and_what_was_expected(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        _find(file=_file(tmp_path, text))


def test_empty_sections_mean_defaults(tmp_path):
    assert _find(file=_file(tmp_path, "train:\nticket:\nmodel:\ndata:\n")) == _find(file=_file(tmp_path, ""))
    assert _find(file=_file(tmp_path, "train:\n"), overrides={"train.epochs": 3}).train.epochs == 3


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        _find(file=tmp_path / "mine.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        _find(file=tmp_path)


def test_yaml_builds_no_objects(tmp_path):
    with pytest.raises(UsageError, match="not YAML"):
        _find(file=_file(tmp_path, f"train: !!python/object/apply:os.system ['touch {tmp_path}/executed']"))
    assert not (tmp_path / "executed").exists()


# -- round trip and digest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "find-ticket", "sfw-prune"])
def test_print_recipe_round_trip(tmp_path, verb):
    flags = ("--set", "train.lr=0.02", "--seed", "3", "--epochs", "9")
    printed = prunectl(verb, "resnet8", "fashion-mini", *flags, "--print-recipe")
    again = prunectl(verb, "resnet8", "fashion-mini", "--recipe", _file(tmp_path, printed.out), "--print-recipe")
    assert printed.code == 0 and printed.out == again.out
    assert read_back(tmp_path / "mine.yaml").digest == validated(yaml.safe_load(again.out)).digest


def test_a_printed_json_recipe_is_a_recipe_too(tmp_path):
    document = prunectl(*FIND, "--print-recipe", "--json").out
    assert _find(file=_file(tmp_path, document)) == _find()


@pytest.mark.parametrize(
    ("asked", "latest"),
    [
        ([], 0.25),
        (["ticket.detector=Spline"], 0.25),
        (["ticket.eps=0.16"], 1),
        (["ticket.window=3"], 1),
        (["ticket.detector=early-bird"], 1),
        (["ticket.latest=0.1"], 0.1),
        (["ticket.eps=0.16", "ticket.latest=0.1"], 0.1),
    ],
)
def test_a_detector_that_was_chosen_is_waited_for(asked, latest):
    assert _find(sets=asked).ticket.latest == latest


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "train.lr=0.011",
        "train.precision=fp32",
        "model.width=0.5",
        "data.train_images=100",
        "ticket.eps=0.1",
        "ticket.probe_images=9",
    ],
)
def test_every_setting_that_decides_a_result_changes_the_digest(change):
    assert _find(sets=[change]).digest != _find().digest


def test_where_and_how_loudly_does_not_change_the_digest():
    base = prunectl(*FIND, "--print-recipe").out
    for flags in (("--out", "/elsewhere"), ("--device", "cpu"), ("--workers", "3"), ("-v",), ("-q",), ("--no-progress",)):
        assert prunectl(*FIND, *flags, "--print-recipe").out == base


def test_the_run_name_tells_verb_model_data_set_and_digest(tmp_path):
    recipe = resolve("train", model=f"{tmp_path}/My Nets.py:small_net", dataset=f"{tmp_path}/my photos/")
    assert recipe.run_name == f"train-My-Nets-small-net-my-photos-{recipe.digest}"
    assert len(recipe.digest) == 8 and int(recipe.digest, 16) >= 0


def test_a_users_file_is_named_for_good(tmp_path, monkeypatch):
    """The same words in another folder name another file, and a saved network is loaded from anywhere."""
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names.append(resolve("train", model="./nets.py:net", dataset="fashion-mini"))
    assert [r.model.name for r in names] == [f"{tmp_path}/one/nets.py:net", f"{tmp_path}/two/nets.py:net"]
    assert names[0].digest != names[1].digest


def test_the_starting_point_is_named_for_good(tmp_path, monkeypatch):
    """runs/latest is another run tomorrow, and this one as soon as it begins."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").symlink_to("one")
    one = resolve("train", model="resnet8", dataset="fashion-mini", overrides={"start": "latest"})
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("two")
    two = resolve("train", model="resnet8", dataset="fashion-mini", overrides={"start": "latest"})
    assert (one.start, two.start) == (str(tmp_path / "one"), str(tmp_path / "two")) and one.digest != two.digest


def test_records_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        _find().train.lr = 1.0  # type: ignore[misc]


def test_a_namesake_elsewhere_has_no_shipped_recipe():
    """Only the project's own names mean its recipes: neither another library's network nor a user's folder."""
    own, defaults = resolve("train", model="resnet18", dataset="cifar10").train, resolve("train", model="nets", dataset="none").train
    assert own != defaults
    for model, dataset in (("torchvision/resnet18", "cifar10"), ("timm/resnet18", "cifar10"), ("resnet18", "mine/cifar10")):
        assert resolve("train", model=model, dataset=dataset).train == defaults


def test_the_recipe_of_another_verb_gives_what_both_read(tmp_path):
    """A dense baseline by the recipe of its ticket is the same run as by one without the ticket's section."""
    recipe = resolve("find-ticket", model="resnet8", dataset="fashion-mini", sets=["train.epochs=7", "ticket.sparsity=0.3"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    train = resolve("train", model="resnet8", dataset="fashion-mini", file=tmp_path / "recipe.yaml")
    assert train.ticket is None and train.train == recipe.train
    assert train.run_name == resolve("train", model="resnet8", dataset="fashion-mini", sets=["train.epochs=7"]).run_name


def test_an_option_and_a_setting_that_contradict_each_other_are_refused():
    resolved = resolve("train", model="resnet8", dataset="fashion-mini", overrides={"train.epochs": 5}, sets=["train.epochs=5"])
    assert resolved.train.epochs == 5
    with pytest.raises(UsageError, match=r"train\.epochs is given twice, 5 by its option and 1 by --set"):
        resolve("train", model="resnet8", dataset="fashion-mini", overrides={"train.epochs": 5}, sets=["train.epochs=1"])


@pytest.mark.parametrize(
    ("key", "option", "setting"),
    [
        ("data.dir", Path("data"), "data"),
        ("ticket.eps", 1e-3, "1e-3"),
        ("ticket.criterion", "bn-scale", "bn_scale"),
    ],
)
def test_an_option_and_a_setting_that_say_the_same_are_taken(key, option, setting):
    resolve("find-ticket", model="resnet8", dataset="fashion-mini", overrides={key: option}, sets=[f"{key}={setting}"])


def test_a_share_and_a_list_of_it_are_the_same():
    with pytest.raises(UsageError, match="given twice"):
        resolve("sfw-prune", model="resnet8", dataset="fashion-mini", overrides={"sfw.sparsity": [0.9]}, sets=["sfw.sparsity=0.8"])
    resolve("sfw-prune", model="resnet8", dataset="fashion-mini", overrides={"sfw.sparsity": [0.9]}, sets=["sfw.sparsity=[0.9]"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [("sfw.fade=true", "fade = true"), ("train.lr=false", "lr = false"), ("sfw.sparsity=true", "sparsity = true")],
)
def test_true_is_no_number(setting, words):
    with pytest.raises(UsageError, match=words):
        resolve("sfw-prune", model="resnet8", dataset="fashion-mini", sets=[setting])


def test_nesterov_needs_momentum():
    with pytest.raises(UsageError, match="nesterov = true with momentum = 0"):
        resolve("train", model="resnet8", dataset="fashion-mini", sets=["train.nesterov=true", "train.momentum=0"])


def test_a_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  epochs: 1\n  lr: 0.1\ntrain:\n  epochs: 3\n")
    with pytest.raises(UsageError, match=r"r\.yaml is not YAML: train comes twice"):
        resolve("train", model="resnet8", dataset="fashion-mini", file=tmp_path / "r.yaml")
