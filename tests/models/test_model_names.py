"""What a name means, and what is said when it means nothing."""

import subprocess
import sys

import pytest
import torchvision

from prunectl.errors import ExitStatus, UnknownName, UsageError
from prunectl.models import ModelName, models, resolve, torchvision_names


def test_help_read_from_source_matches_the_registered_functions() -> None:
    assert list(models.help()) == models.names()
    for name, line in models.help().items():
        assert (models.get(name).__doc__ or "").split("\n")[0] == line


def test_torchvision_names_read_from_source_are_its_classification_models() -> None:
    assert torchvision_names() == torchvision.models.list_models(module=torchvision.models)


def test_names_and_help_import_no_torch() -> None:
    code = (
        "import sys; from prunectl.models import models, resolve; models.help(); resolve('densenet121'); "
        "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("spelling", "expected", "canonical"),
    [
        ("resnet18", ModelName("prunectl", "resnet18"), "resnet18"),
        ("preresnet_101", ModelName("prunectl", "preresnet-101"), "preresnet-101"),
        ("MobileNet_V2", ModelName("prunectl", "mobilenet-v2"), "mobilenet-v2"),  # a registered name wins
        ("torchvision/mobilenet-v2", ModelName("torchvision", "mobilenet_v2"), "torchvision/mobilenet_v2"),
        ("mobilenet-v3-small", ModelName("torchvision", "mobilenet_v3_small"), "torchvision/mobilenet_v3_small"),
        ("timm/resnet18", ModelName("timm", "resnet18"), "timm/resnet18"),
        ("nets/my_net.py:Small_Net", ModelName("file", "nets/my_net.py:Small_Net"), "nets/my_net.py:Small_Net"),
    ],
)
def test_resolve(spelling: str, expected: ModelName, canonical: str) -> None:
    assert resolve(spelling) == expected
    assert str(expected) == canonical
    assert resolve(canonical) == expected


@pytest.mark.parametrize(
    ("name", "suggestion"), [("resnet-18", "resnet18"), ("mobilenetv2", "mobilenet-v2"), ("densnet121", "densenet121"), ("vgg", "vgg")]
)
def test_unknown_name_offers_the_nearest_registered_or_torchvision_name(name: str, suggestion: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean.*{suggestion}") as caught:
        resolve(name)
    assert caught.value.status == ExitStatus.USAGE


def test_a_name_like_no_other_lists_ours_and_the_other_forms() -> None:
    with pytest.raises(UnknownName, match=r"known: alexnet, .*vgg16\. .*file\.py:function"):
        resolve("qqqqqq")


def test_unknown_torchvision_name() -> None:
    with pytest.raises(UnknownName, match="did you mean resnet50"):
        resolve("torchvision/resnet51")


@pytest.mark.parametrize("name", ["net.py", "net.py:", ":net.py", "net.py:two words"])
def test_a_file_needs_its_function(name: str) -> None:
    with pytest.raises(UsageError, match=r"path/to/file\.py:function"):
        resolve(name)
