"""The cells: which arms run on which network with which seed, and the command line of each.

A cell that has a JSON in results/ is done. Accuracy cells may run beside other work; wall times are not read from them."""

from __future__ import annotations

from dataclasses import dataclass

EPOCHS = 20
TRAIN_IMAGES = 18_000  # with the carved validation images about 20,000 of Fashion-MNIST's 60,000
NETS = {"thin": ("resnet8", 1.0), "wide": ("resnet18", 0.25)}


@dataclass(frozen=True)
class Cell:
    """One run of the command line. `arm` names what is compared, `verb` and `options` say how."""

    arm: str
    net: str
    seed: int
    verb: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.net}-{self.arm}-s{self.seed}"

    def command(self, out: str) -> list[str]:
        model, width = NETS[self.net]
        sets = [f"model.width={width}", f"data.train_images={TRAIN_IMAGES}"]
        return [
            *("prunectl", self.verb, model, "fashion-mnist", "--epochs", str(EPOCHS), "--seed", str(self.seed)),
            *(part for s in sets for part in ("--set", s)),
            *self.options,
            *("--out", out, "--json", "--resume", "--no-progress"),
        ]


def main_job() -> list[Cell]:
    """Dense and default ticket at 50 % of the channels, three seeds, test accuracy."""
    return [
        cell
        for net in ("thin", "wide")
        for seed in (0, 1, 2)
        for cell in (Cell("dense", net, seed, "train"), Cell("default50", net, seed, "find-ticket", ("--sparsity", "0.5")))
    ]


STAGES = {"main-job": main_job}
