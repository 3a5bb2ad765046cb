"""FP16 and INT8 on a network trained for a few seconds on real images, so that a point of accuracy means something."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from export_nets import images, tiny
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional as F

from prunectl.data import load
from prunectl.errors import DeviceUnavailable, UsageError
from prunectl.export import graph, onnx, profiles, quantize, verify
from prunectl.export.artifact import InputSpec


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def fashion():
    return load("fashion-mini")


@pytest.fixture(scope="module")
def spec(fashion):
    info = fashion.info
    return InputSpec.from_data({**info.to_dict(), "name": info.name})


@pytest.fixture(scope="module")
def trained(fashion):
    torch.manual_seed(0)
    net = Small()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for x, y in (batch for epoch in range(2) for batch in fashion.train_batches(epoch, batch_size=64, seed=0)):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def exported(trained, spec, orin):
    return onnx.build(trained, spec, orin, batch=None)


@pytest.fixture(scope="module")
def calibration(fashion):
    return [fashion.sample(256, seed=0)[0]]


@pytest.fixture(scope="module")
def test_split(fashion):
    return list(fashion.eval_batches("test", batch_size=500))


@pytest.fixture(scope="module")
def exact(exported, spec, test_split):
    return verify.accuracy(verify.classifier(exported, spec), test_split)


def test_the_file_is_as_accurate_as_the_network(trained, exact, test_split):
    with torch.no_grad():
        right = sum(int((trained(x).argmax(1) == y).sum()) for x, y in test_split)
    assert exact.n == 2000
    assert exact.top1 == 100 * right / 2000
    assert exact.top1 > 60  # it has learnt something: chance is 10


@pytest.mark.parametrize("quantised", [quantize.for_cpu, quantize.for_tensorrt])
def test_int8_is_within_a_point_of_fp32(quantised, exported, calibration, spec, test_split, exact, trained):
    model = quantised(exported, calibration)
    session = verify.classifier(model, spec)
    assert abs(verify.accuracy(session, test_split).top1 - exact.top1) <= 1
    verify.require_same(verify.compare(trained, session, test_split[:1]), "int8")
    assert graph.cost(model).macs == graph.cost(exported).macs
    assert graph.cost(model).kernel_params == graph.cost(exported).kernel_params
    assert model.metadata_props == exported.metadata_props


def test_fp16_is_within_its_tolerance_and_half_the_size(exported, spec, trained, test_split):
    model = quantize.to_fp16(exported)
    assert model.ByteSize() < 0.6 * exported.ByteSize()
    assert {t.data_type for t in model.graph.initializer if len(t.dims) > 1} == {TensorProto.FLOAT16}
    assert graph.cost(model) == graph.cost(exported)
    verify.require_same(verify.compare(trained, verify.classifier(model, spec), test_split[:1]), "fp16")


def test_half_precision_neither_lifts_zeros_nor_cuts_large_weights(tx2_model):
    model = graph.without_identities(tx2_model)
    name = model.graph.node[0].input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[:3] = 0, 1e-9, 20000
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    half = next(t for t in quantize.to_fp16(model).graph.initializer if list(t.dims) == list(tensor.dims))
    assert numpy_helper.to_array(half).flat[:3] == pytest.approx([0, 0, 20000])


def test_int8_files_are_smaller_where_weights_are_stored_in_8_bits(exported, calibration):
    assert quantize.for_cpu(exported, calibration).ByteSize() < 0.5 * exported.ByteSize()


def test_only_inputs_of_products_are_quantised_for_tensorrt(exported, calibration):
    """So Conv and ReLU still fuse: no Q/DQ stands between them."""
    model = quantize.for_tensorrt(exported, calibration)
    maker = graph.View(model).producer
    relus = [n for n in model.graph.node if n.op_type == "Relu"]
    assert [maker[n.input[0]].op_type for n in relus] == ["Conv"] * 3


@pytest.mark.parametrize("quantised", [quantize.for_cpu, quantize.for_tensorrt])
def test_a_broken_layer_is_found_by_the_report(quantised, exported, calibration, test_split):
    x = test_split[0][0].numpy()
    model = quantised(exported, calibration)
    healthy = {e.layer: e.signal_to_noise_db for e in quantize.layer_errors(exported, model, x)}
    assert [layer.split("/")[1] for layer in sorted(healthy)] == ["convs.0", "convs.1", "convs.2", "fc"]
    assert min(healthy.values()) > 15  # 8 bits: tens of decibels
    view = graph.View(model)
    layer = next(n for n in model.graph.node if n.name == "/convs.1/Conv")
    scale = view.initializers[view.producer[layer.input[1]].input[1]]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 200, scale.name))
    broken = {e.layer: e.signal_to_noise_db for e in quantize.layer_errors(exported, model, x)}
    assert broken["/convs.0/Conv"] == healthy["/convs.0/Conv"]
    assert broken["/convs.1/Conv"] < 5
    assert list(broken)[-1] == "/convs.0/Conv"  # worst first: what comes behind the broken layer suffers with it


def test_calibration_is_cut_into_the_graph_s_batch(trained, spec, orin, fashion):
    four = onnx.build(trained, spec, orin, batch=4)
    pieces = [fashion.sample(n, seed=n)[0] for n in (3, 6, 2)]
    seen = list(quantize._pieces(pieces, 4))
    assert [len(p) for p in seen] == [4, 4]
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate([p.numpy() for p in pieces])[:8])
    assert [len(p) for p in quantize._pieces(pieces, None)] == [3, 6, 2]
    assert graph.static_batch(quantize.for_cpu(four, pieces)) == 4


def test_no_calibration_images_is_a_usage_error(exported):
    with pytest.raises(UsageError, match="int8 needs calibration images"):
        quantize.for_cpu(exported, [])


def test_fp16_without_its_library_says_how_to_get_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxconverter_common", None)
    with pytest.raises(DeviceUnavailable, match=r"pip install 'prunectl\[fp16\]'"):
        quantize.to_fp16(exported)


def test_int8_with_pixel_input_keeps_the_front_exact(exported, calibration, spec, test_split, exact):
    profile = profiles.load("cpu")
    pixels = onnx.lowered(exported, spec.of_pixels(), profile, "int8", calibration)
    assert [n.op_type for n in pixels.graph.node[:3]] == ["Cast", "Mul", "Sub"]
    assert abs(verify.accuracy(verify.classifier(pixels, spec.of_pixels()), test_split).top1 - exact.top1) <= 1


def test_quantising_leaves_its_argument_alone(tx2_model, orin_model):
    before = orin_model.SerializeToString()
    quantize.for_tensorrt(orin_model, [images()])
    quantize.to_fp16(orin_model)
    assert orin_model.SerializeToString() == before
    assert tiny() is not None
