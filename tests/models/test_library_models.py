"""torchvision's and timm's classifiers, adapted to the data."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from prunectl.errors import UnknownName, UsageError
from prunectl.models import build, torchvision_names
from prunectl.models.shapes import build_without_weights
from prunectl.pruning.spline import activation_code


@pytest.mark.parametrize("name", torchvision_names())
def test_every_torchvision_classifier_takes_other_channels_and_classes(name: str) -> None:
    model = build_without_weights(f"torchvision/{name}", num_classes=7, in_channels=1, image_size=224).eval()
    with torch.device("meta"), torch.no_grad():
        assert model(torch.zeros(1, 1, 224, 224)).shape == (1, 7)


def test_three_channels_are_torchvisions_own_network() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = torchvision.models.squeezenet1_1(weights=None, num_classes=7)
    ours = build("squeezenet1_1", num_classes=7, in_channels=3, image_size=64, seed=3)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_other_channels_keep_the_variance_of_the_first_layer(channels: int) -> None:
    x = torch.randn(64, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    rgb = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def deviation(in_channels: int, images: torch.Tensor) -> float:
        model = build("torchvision/resnet34", num_classes=7, in_channels=in_channels, image_size=64)
        assert isinstance(model.conv1, nn.Conv2d)
        assert model.conv1.in_channels == in_channels
        with torch.no_grad():
            return float(model.conv1(images).std())

    # one channel has 64 x 49 random weights: their standard deviation is off by 1 / sqrt(2 x 3136) = 1.3 %; three of these and edges
    assert deviation(channels, x) == pytest.approx(deviation(3, rgb), rel=0.05)


@pytest.mark.parametrize(("name", "size", "relus"), [("torchvision/resnet34", 28, 33), ("densenet121", 32, 121), ("googlenet", 28, 57)])
def test_activation_codes_see_shared_functional_and_in_place_relus(name: str, size: int, relus: int) -> None:
    model = build(name, num_classes=7, in_channels=1, image_size=size)
    probe = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    assert len(activation_code(model, probe).layers) == relus


def test_weights_depend_on_the_seed_alone() -> None:
    a, b, c = (
        build("mobilenet_v3_small", num_classes=7, in_channels=1, image_size=32, seed=s).state_dict()["features.0.0.weight"]
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_width_is_for_our_own_models() -> None:
    with pytest.raises(UsageError, match=r"model\.width = 0\.5 with torchvision/densenet121"):
        build("densenet121", num_classes=7, in_channels=3, image_size=32, width=0.5)


def test_timm_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what import sees when a package is not there
    with pytest.raises(UsageError, match=r"pip install 'prunectl\[timm\]'"):
        build("timm/resnet18", num_classes=7, in_channels=3, image_size=32)


def test_timm_models() -> None:
    pytest.importorskip("timm")
    model = build("timm/resnet10t", num_classes=7, in_channels=1, image_size=32).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(UnknownName, match="tag after the dot"):
        build("timm/resnet50.a1_in1k", num_classes=7, in_channels=3, image_size=32)
