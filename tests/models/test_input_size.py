"""The size a network sees: the image's own where it can, padded or resized where it cannot."""

import pytest
import torch

from prunectl.errors import UsageError
from prunectl.models import InputSize, build, input_size, models


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("size", [28, 32, 64, 224])
def test_ours_take_images_as_they_are(name: str, size: int) -> None:
    assert input_size(name, size) == InputSize(size, "none")


@pytest.mark.parametrize(
    ("name", "native", "expected"),
    [
        ("vgg16", 12, InputSize(16, "pad")),
        ("torchvision/vgg16_bn", 28, InputSize(32, "pad")),
        ("densenet121", 28, InputSize(32, "pad")),
        ("convnext_tiny", 28, InputSize(32, "pad")),
        ("mobilenet_v3_small", 28, InputSize(28, "none")),
        ("efficientnet_b0", 28, InputSize(28, "none")),
        ("regnet_x_400mf", 28, InputSize(28, "none")),
        ("inception_v3", 64, InputSize(80, "pad")),
        ("inception_v3", 28, InputSize(80, "resize")),
        ("vit_b_16", 28, InputSize(224, "resize")),
        ("vit_b_16", 224, InputSize(224, "none")),
        ("vit_b_16", 256, InputSize(224, "resize")),
    ],
)
def test_found_by_trying(name: str, native: int, expected: InputSize) -> None:
    assert input_size(name, native) == expected


@pytest.mark.parametrize(
    ("name", "native"), [("densenet121", 28), ("convnext_tiny", 28), ("inception_v3", 64), ("torchvision/vgg11_bn", 28)]
)
def test_what_was_found_on_shapes_alone_holds_for_real_numbers(name: str, native: int) -> None:
    size = input_size(name, native).size
    model = build(name, num_classes=10, in_channels=3, image_size=size).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(logits).all()
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize(
    ("native", "explicit", "fit"),
    [(28, 28, "none"), (28, 32, "pad"), (28, 37, "pad"), (28, 38, "resize"), (28, 64, "resize"), (28, 20, "resize")],
)
def test_an_explicit_size_is_used(native: int, explicit: int, fit: str) -> None:
    assert input_size("resnet8", native, image_size=explicit) == InputSize(explicit, fit)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "explicit", "needed"), [("densenet121", 28, 32), ("vit_b_16", 32, 224), ("vgg16", 15, 16)])
def test_an_explicit_size_that_does_not_work_is_refused_with_one_that_does(name: str, explicit: int, needed: int) -> None:
    with pytest.raises(UsageError, match=rf"data\.image_size = {explicit}: .* needs {needed} pixels"):
        input_size(name, 28, image_size=explicit)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    input_size("resnet8", 28)
    assert torch.equal(torch.get_rng_state(), before)
