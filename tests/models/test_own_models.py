"""Laws that every registered model obeys, and the figures published for those that have some."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from prunectl.errors import UsageError
from prunectl.models import build, models
from prunectl.models.layers import scaled
from prunectl.models.preresnet import PreActBottleneck, preresnet
from prunectl.models.shapes import build_without_weights
from prunectl.pruning.spline import activation_code

NAMES = models.names()
every_model = pytest.mark.parametrize("name", NAMES)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@every_model
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (3, 32, 100), (3, 64, 200)])
def test_logits_at_small_sizes(name: str, channels: int, size: int, classes: int) -> None:
    model = build(name, num_classes=classes, in_channels=channels, image_size=size, width=0.25).eval()
    with torch.no_grad():
        logits = model(images(2, channels, size, size))
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()
    assert (logits[0] != logits[1]).any()


@every_model
def test_shapes_at_imagenet_size(name: str) -> None:
    model = build_without_weights(name, num_classes=1000, in_channels=3, image_size=224)
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@every_model
def test_parameters_grow_with_width(name: str) -> None:
    counts = [
        parameters(build_without_weights(name, num_classes=10, in_channels=3, image_size=32, width=w)) for w in (0.25, 0.5, 1, 1.5, 2)
    ]
    assert counts == sorted(set(counts))


@every_model
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return build(name, num_classes=10, in_channels=1, image_size=28, width=0.25, seed=seed).state_dict()

    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    again, other = weights(5), weights(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first if key.endswith("weight") and first[key].dim() > 1)


@every_model
def test_each_relu_is_a_module_that_runs_once(name: str) -> None:
    model = build(name, num_classes=10, in_channels=1, image_size=28, width=0.25).eval()
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    seen: list[nn.Module] = []
    for relu in relus:
        relu.register_forward_pre_hook(lambda module, _: seen.append(module))
    model(images(2, 1, 28, 28))
    assert sorted(map(id, seen)) == sorted(map(id, relus))
    assert len(activation_code(model, images(2, 1, 28, 28)).layers) == len(relus)  # it sees functions too


@every_model
def test_batchnorm_weights_start_at_half_in_vgg_and_preresnet(name: str) -> None:
    model = build(name, num_classes=10, in_channels=3, image_size=32, width=0.25)
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert (gammas == (0.5 if name.startswith(("vgg", "preresnet")) else 1)).all()


@every_model
@pytest.mark.parametrize("size", [28, 96])
def test_exports_to_opset_13_as_plain_layers(name: str, size: int, tmp_path: Path) -> None:
    """No Shape, Gather or Reshape; and ONNX Runtime computes the same logits."""
    model = build(name, num_classes=10, in_channels=3, image_size=size, width=0.25)
    x = images(8, 3, size, size)
    generator = torch.Generator().manual_seed(1)
    model(x)  # batch statistics other than 0 and 1
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, mean=1, std=0.1, generator=generator)  # equal tensors would be shared through Identity nodes
        nn.init.normal_(norm.bias, std=0.1, generator=generator)
    model.eval()
    assert isinstance(fx.symbolic_trace(model), fx.GraphModule)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, opset_version=13, dynamo=False, input_names=["image"])
    graph = onnx.load(file).graph
    plain = {"Conv", "BatchNormalization", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm"}
    assert {node.op_type for node in graph.node} <= plain
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        expected = model(x).numpy()
    # float32 sums in another order, through up to 101 layers
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@every_model
def test_half_of_every_group_of_channels_can_be_removed(name: str) -> None:
    model = build(name, num_classes=10, in_channels=3, image_size=32, width=0.5)
    x = images(4, 3, 32, 32)
    widths = {key: m.out_channels for key, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    graph = torch_pruning.DependencyGraph().build_dependency(model, x)
    for group in graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d, nn.Linear]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        graph.get_pruning_group(root, prune, list(range(0, graph.get_out_channels(root), 2))).prune()
    assert {key: m.out_channels for key, m in model.named_modules() if isinstance(m, nn.Conv2d)} == {k: c // 2 for k, c in widths.items()}
    logits = model(x)
    logits.sum().backward()
    assert logits.shape == (4, 10)


@pytest.mark.parametrize(
    ("name", "classes", "size", "expected"),
    [
        ("resnet18", 1000, 224, 11_689_512),  # torchvision's ResNet18_Weights, num_params
        ("resnet50", 1000, 224, 25_557_032),  # torchvision's ResNet50_Weights
        ("mobilenet-v2", 1000, 224, 3_504_872),  # torchvision's MobileNet_V2_Weights
        ("resnet18", 10, 32, 11_173_962),  # github.com/kuangliu/pytorch-cifar, ResNet18
        ("resnet50", 10, 32, 23_520_842),  # github.com/kuangliu/pytorch-cifar, ResNet50
        # 14.7 M convolutions (Simonyan and Zisserman, table 2, without the fully connected layers) + 2 x 4,224 norm + 5,130 linear
        ("vgg16", 10, 32, 14_710_464 + 8_448 + 5_130),
        # He et al. 2016 give 0.27 M with zero-padded shortcuts; the two projections add 32 x 16 + 64 x 32 + 2 x 96
        ("resnet20", 10, 32, 269_722 + 2_752),
        # MLPerf Tiny's ResNet-8 counts 78,666, with 336 convolution biases and 480 running statistics, and no norm (192) in the shortcuts
        ("resnet8", 10, 32, 78_666 - 336 - 480 + 192),
    ],
)
def test_published_parameter_counts(name: str, classes: int, size: int, expected: int) -> None:
    assert parameters(build_without_weights(name, num_classes=classes, in_channels=3, image_size=size)) == expected


@pytest.mark.parametrize(("classes", "millions"), [(10, 1.70), (100, 1.73)])
def test_preresnet_164_parameters_are_those_of_network_slimming(classes: int, millions: float) -> None:
    """Liu et al., ICCV 2017, table 1: the published depth; ours are 20, 56 and 101."""
    with torch.device("meta"):
        model = preresnet(164, num_classes=classes, in_channels=3, width=1)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)  # two decimals are published


@pytest.mark.parametrize(
    ("name", "classes", "size", "mega_macs", "tolerance"),
    [
        ("resnet18", 1000, 224, 1814, 0.001),  # torchvision's weights, "_ops" 1.814
        ("resnet50", 1000, 224, 4089, 0.001),  # torchvision's weights, "_ops" 4.089
        ("mobilenet-v2", 1000, 224, 301, 0.002),  # torchvision's weights, "_ops" 0.301
        ("vgg16", 10, 32, 313, 0.002),  # Li et al., ICLR 2017, table 1: 3.13e8
        ("resnet8", 10, 32, 12.5, 0.005),  # MLPerf Tiny (Banbury et al. 2021): 12.5 M
    ],
)
def test_published_macs(name: str, classes: int, size: int, mega_macs: float, tolerance: float) -> None:
    model = build_without_weights(name, num_classes=classes, in_channels=3, image_size=size).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, rel=tolerance)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_load_and_compute_the_same(name: str) -> None:
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    ours = build(name, num_classes=7, in_channels=3, image_size=96).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images(2, 3, 96, 96)), theirs(images(2, 3, 96, 96)), rtol=0, atol=0)  # the same operations


@pytest.mark.parametrize("width", [0.35, 0.5, 1.0, 1.4])
def test_mobilenet_is_torchvisions_with_relu(width: float) -> None:
    theirs = torchvision.models.mobilenet_v2(weights=None, num_classes=7, width_mult=width).eval()
    for name, module in list(theirs.named_modules()):
        if isinstance(module, nn.ReLU6):
            theirs.set_submodule(name, nn.ReLU())
    ours = build("mobilenet-v2", num_classes=7, in_channels=3, image_size=96, width=width).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))  # in order of execution
    with torch.no_grad():
        torch.testing.assert_close(ours(images(2, 3, 96, 96)), theirs(images(2, 3, 96, 96)), rtol=0, atol=0)


def test_a_preactivation_stream_passes_negative_values() -> None:
    block = PreActBottleneck(32, 8, stride=1)
    nn.init.zeros_(block.conv3.weight)
    x = images(2, 32, 4, 4)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "size", "kernel", "final"), [("resnet18", 64, 3, 8), ("resnet18", 65, 7, 3), ("mobilenet-v2", 64, 3, 8)])
def test_small_images_keep_their_resolution(name: str, size: int, kernel: int, final: int) -> None:
    model = build_without_weights(name, num_classes=10, in_channels=3, image_size=size)
    assert isinstance(model, nn.Sequential) and isinstance(model.conv1, nn.Conv2d)
    assert model.conv1.kernel_size == (kernel, kernel)
    assert model[:-3](torch.zeros(2, 3, size, size, device="meta")).shape[-1] == final


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(16, 0.5, 8), (16, 0.01, 8), (64, 1, 64), (24, 0.75, 24), (64, 0.3, 24), (96, 1.4, 136)]
)
def test_scaled_channels(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, r"model\.width = 0"),
        ({"width": float("nan")}, r"model\.width = nan"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"in_channels": -1}, "in_channels = -1"),
        ({"image_size": 0}, "image_size = 0"),
    ],
)
def test_values_that_cannot_be_used(change: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("resnet8", **{"num_classes": 10, "in_channels": 1, "image_size": 28, **change})  # type: ignore[arg-type]
