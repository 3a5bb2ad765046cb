"""path/to/file.py:function: called with what it takes, blamed with file and line."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunectl.errors import ExitStatus, UnknownName, UsageError
from prunectl.models import build, input_size
from prunectl.models.userfile import sources

NET = """
from torch import nn

def net(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def make(path: Path | str, function: str = "net", **change: Any) -> torch.nn.Module:
    return build(f"{path}:{function}", **{"num_classes": 5, "in_channels": 2, "image_size": 20, **change})


def test_called_with_the_arguments_it_names(tmp_path: Path) -> None:
    model = make(write(tmp_path, NET))
    assert model(torch.zeros(3, 2, 20, 20)).shape == (3, 5)


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path, NET)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    a, b, c = (make(path, seed=s)[0].weight for s in (1, 1, 2))  # type: ignore[index]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("signature", "change", "received"),
    [
        ("num_classes, in_channels, image_size, width", {"width": 0.5}, (5, 2, 20, 0.5)),
        ("*, image_size, num_classes=1, depth=3", {}, (20, 5, 3)),
        ("**given", {}, ({"num_classes": 5, "in_channels": 2, "image_size": 20},)),
        ("**given", {"width": 2}, ({"num_classes": 5, "in_channels": 2, "image_size": 20, "width": 2},)),
        ("", {}, ()),
    ],
)
def test_arguments(tmp_path: Path, signature: str, change: dict[str, Any], received: tuple[object, ...]) -> None:
    names = ", ".join(re.findall(r"[a-z_]+", signature))
    body = f"    model = nn.Identity()\n    model.received = ({names}{',' if names else ''})\n    return model\n"
    text = f"from torch import nn\ndef net({signature}):\n{body}"
    assert make(write(tmp_path, text), **change).received == received


def test_a_class_is_a_function_and_neighbours_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 8\n", "neighbour.py")
    text = (
        "from dataclasses import dataclass\nfrom neighbour import WIDTH\nfrom torch import nn\n"
        "@dataclass\nclass Settings:\n    width: int = WIDTH\n"
        "class Net(nn.Linear):\n    def __init__(self, num_classes):\n        super().__init__(Settings().width, num_classes)\n"
    )
    path_before = list(sys.path)
    assert make(write(tmp_path, text), "Net")(torch.zeros(1, 8)).shape == (1, 5)
    assert sys.path == path_before


def test_its_sources_are_the_file_and_the_neighbours_that_it_imports(tmp_path: Path) -> None:
    path = write(tmp_path, "import torch\nfrom neighbour import WIDTH\n")
    write(tmp_path, "import mine\nimport parts.inner\nWIDTH = 8\n", "neighbour.py")
    write(tmp_path, "", "another.py")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", "", "inner.py")
    assert {p.name for p in sources(f"{path}:net")} == {"mine.py", "neighbour.py", "inner.py"}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("def net(:\n    pass\n", 1, "SyntaxError"),
        ("import torch\nimport no_such_module\n", 2, "ModuleNotFoundError"),
        ("def net(num_classes):\n    x = 1\n    return undefined\n", 3, "NameError: name 'undefined'"),
        ("import sys\n\ndef net():\n    sys.exit('no licence')\n", 4, "SystemExit: no licence$"),
        ("def helper():\n    raise RuntimeError('no\\nmore')\n\ndef net():\n    return helper()\n", 2, "RuntimeError: no$"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, what: str) -> None:
    path = write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    for spelling in (path, "mine.py"):
        with pytest.raises(UsageError, match=rf"^{re.escape(str(spelling))}:{line}: {what}") as caught:
            make(spelling)
        assert caught.value.status == ExitStatus.USAGE


def test_missing_file_and_function(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        make(tmp_path / "absent.py")
    with pytest.raises(UnknownName, match=r"unknown function in .*mine\.py 'nett': did you mean net"):
        make(write(tmp_path, NET), "nett")


def test_unusable_functions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="requires depth; it gets num_classes, in_channels, image_size, width"):
        make(write(tmp_path, "def net(depth):\n    pass\n"))
    with pytest.raises(UsageError, match=r"net returned int; expected a torch\.nn\.Module"):
        make(write(tmp_path, "def net():\n    return 3\n"))
    with pytest.raises(UsageError, match="takes no `width`"):
        make(write(tmp_path, NET), width=2)
    argumentless = "from torch import nn\nclass Net(nn.Module):\n    pass\n"
    with pytest.raises(
        UsageError, match=r"mine\.py: TypeError: .* unexpected keyword argument"
    ):  # raised in torch, not on a line of the file
        make(write(tmp_path, argumentless), "Net")


def test_input_size_runs_the_network_on_the_data_it_is_for(tmp_path: Path) -> None:
    text = NET.replace("nn.Conv2d(in_channels, 8, 3)", "nn.Conv2d(in_channels, 8, 31)")
    assert input_size(f"{write(tmp_path, text)}:net", 28, in_channels=2).size == 32


def test_a_forward_that_never_works_is_blamed_on_its_line(tmp_path: Path) -> None:
    text = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x @ 3\ndef net():\n    return Net()\n"
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=rf"runs at no image size from 16 to 512 pixels; at 28: {re.escape(str(path))}:4: TypeError"):
        input_size(f"{path}:net", 28)


def test_outputs_that_are_no_logits_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, NET)
    text = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x, x\ndef net():\n    return Net()\n"
    with pytest.raises(UsageError, match="returned tuple for 2 images"):
        input_size(f"{write(tmp_path, text, 'two.py')}:net", 28)
    fixed = "from mine import net\n\ndef thousand(in_channels):\n    return net(1000, in_channels)\n"
    with pytest.raises(UsageError, match=r"returned \(2, 1000\) for 2 images; expected logits of shape \(2, 10\)"):
        input_size(f"{write(path.parent, fixed, 'fixed.py')}:thousand", 28)


def test_neighbours_of_one_file_are_not_those_of_the_next(tmp_path: Path) -> None:
    """Two folders, each with a module of the same name."""
    for name, width in (("one", 16), ("two", 32)):
        folder = tmp_path / name
        (folder / "parts").mkdir(parents=True)
        write(folder, f"W = {width}", "blocks_of_a_test.py")
        write(folder / "parts", "from blocks_of_a_test import W", "__init__.py")
        write(folder, NET.replace("from torch import nn", "from torch import nn\nfrom parts import W").replace("8", "W"))
        assert make(folder / "mine.py")[0].out_channels == width  # type: ignore[index]
    assert not {"blocks_of_a_test", "parts"} & set(sys.modules)


LAZY = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))
"""


def test_lazy_layers_get_their_sizes_from_the_image_and_their_weights_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, LAZY)
    one, again, other = (make(path, seed=s).state_dict() for s in (1, 1, 2))
    assert one["4.weight"].shape == (5, 8 * 18 * 18) and torch.equal(one["4.weight"], again["4.weight"])
    assert not torch.equal(one["4.weight"], other["4.weight"])


HEADS = """
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self, c, n):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(c, 8, 3), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, n)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return (self.fc(y), y) if self.training else self.fc(y)

class Alone(Heads):
    def forward(self, x):
        return self.fc(self.norm(self.conv(x).mean((2, 3))))

class Noted(nn.Conv2d):
    def get_extra_state(self):
        return {"note": 1}

def two(num_classes, in_channels):
    return Heads(in_channels, num_classes)

def alone(num_classes, in_channels):
    return Alone(in_channels, num_classes)

def noted(num_classes, in_channels):
    return nn.Sequential(Noted(in_channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [("two", "tuple in training mode"), ("alone", "Expected more than 1 value per channel"), ("noted", "0._extra_state is no tensor")],
)
def test_networks_that_could_not_be_trained_or_saved_are_refused_at_once(tmp_path: Path, function: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        input_size(f"{write(tmp_path, HEADS)}:{function}", 28, in_channels=1)
