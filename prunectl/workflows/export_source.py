"""What is exported: a saved network, pruned once more if that is asked for, and the images it was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prunectl import data
from prunectl.data import Dataset
from prunectl.errors import CorruptFile, DataMissing, UnknownName, UsageError, VerificationFailed
from prunectl.pruning.recalibrate import recalibrate_
from prunectl.recipe import Recipe, Sfw, read_back
from prunectl.rundir import RunDir, read_json
from prunectl.training import compactmodel
from prunectl.training.compactmodel import CompactModel
from prunectl.workflows.sweep import calibration_images, pruned, pruned_nm

FINAL = {"train": "top1", "find-ticket": "final", "sfw-prune": "dense"}  # what a verb calls the accuracy of the network it leaves
Pattern = tuple[int, int]


def parse_sparsity(text: str) -> float | Pattern:
    """A share of the weights, or (N, M). Raises UsageError."""
    if ":" in text:
        n, _, m = text.partition(":")
        if n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m):
            return int(n), int(m)
        raise UsageError(f"--sparsity {text}: expected N:M with N below M, e.g. 2:4, or a share such as 0.9")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--sparsity {text}: expected a share between 0 and 1, e.g. 0.9, or a pattern such as 2:4")
    return share


def home(network: Path) -> Path:
    """The run folder that holds a saved network, else the network's own."""
    folder = network.resolve()
    return folder.parent if RunDir(folder.parent).recipe.is_file() else folder


@dataclass(frozen=True)
class Source:
    """A saved network and what the run around it was asked for, if one is."""

    saved: CompactModel
    recipe: Recipe | None
    data_dir: Path | None

    @classmethod
    def at(cls, path: Path, data_dir: Path | None) -> Source:
        """Raises UsageError when `path` is neither a finished run nor a saved network, CorruptFile."""
        saved = compactmodel.read(compactmodel.locate(path))
        run = RunDir(home(saved.path))
        return cls(saved, read_back(run.recipe) if run.recipe.is_file() else None, data_dir)

    @property
    def run(self) -> RunDir:
        """The folder around it; of a network that lies alone, one without a recipe."""
        return RunDir(home(self.saved.path))

    def dataset(self) -> Dataset:
        """The network's own images, split and seen as it saw them: with its normalisation, not one measured anew.

        Raises DataMissing where they are not at hand, UsageError where what is there has other classes."""
        info, ours = self.saved.plan["data"], self.recipe.data if self.recipe else None
        name, place = (info["name"], self.data_dir) if self.data_dir or not ours else (ours.name, ours.dir)
        if name not in data.datasets and self.data_dir and (self.data_dir.expanduser() / "train").is_dir():
            name = str(self.data_dir)  # the set's own folder, or one that holds it under its name
        try:
            images = data.load(
                name,
                data_dir=place,
                image_size=info["image_size"],
                fit=info["fit"] if info["fit"] in ("pad", "resize") else "pad",
                normalisation={"mean": tuple(info["mean"]), "std": tuple(info["std"])},
                val_fraction=ours.val_fraction if ours else None,
                train_images=ours.train_images if ours else None,
            )
        except (UnknownName, DataMissing) as e:
            raise DataMissing(f"the network's data set is not at hand: {str(e).rstrip('.')}; --data-dir names another place") from None
        if list(images.info.classes) != list(info["classes"]):
            raise UsageError(
                f"{name} has {len(images.info.classes)} classes ({', '.join(images.info.classes[:3])}, ...) where the network was trained "
                f"on {len(info['classes'])} ({', '.join(info['classes'][:3])}, ...): name its own data set's folder with --data-dir"
            )
        return images

    def require_same(self, images: Dataset) -> None:
        """Raises VerificationFailed if they are not those of its run; of runs that wrote no fingerprint nothing is known."""
        recorded = read_json(self.run.info).get("images") if self.run.info.is_file() else None
        if recorded not in (None, images.fingerprint()):
            raise VerificationFailed(
                f"the images of {images.info.name} are not those that {self.run.path} was made with, and batch norm or INT8 would take its "
                "ranges from them: name their folder with --data-dir"
            )

    def network(self, sparsity: float | Pattern | None, images: Dataset | None) -> nn.Module:
        """The saved network, or it pruned once as one row of a sweep: batch norm re-estimated on the training images of its run.

        What is ranked and how comes from the run's recipe, or is the default of sfw-prune. images: its own, as `dataset` gives them;
        None: looked for where they are needed. Raises DataMissing, VerificationFailed."""
        module = self.saved.module()
        if sparsity is None:
            return module
        settings = (self.recipe.sfw if self.recipe else None) or Sfw()
        module = pruned_nm(module, *sparsity) if isinstance(sparsity, tuple) else pruned(module, sparsity, settings)
        if settings.bn_recal:
            images = images or self.dataset()
            self.require_same(images)
            recalibrate_(module, calibration_images(images, settings.bn_recal))
        return module

    def test_accuracy(self) -> float | None:
        """What its run measured of this very network on the test split, in percent; None where it did not."""
        run = self.run
        if not run.finished or compactmodel.locate(run.path) != self.saved.path.resolve():
            return None
        result = run.read_result()
        try:
            found = result.get("accuracy", {})
            final = found.get(FINAL.get(result.get("verb", ""), ""))
            return float(final) if final is not None and found.get("split", "test") == "test" else None
        except (AttributeError, TypeError, ValueError) as e:
            raise CorruptFile(f"{run.result} is damaged ({e}); run the command again with --overwrite") from None
