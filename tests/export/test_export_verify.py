"""The verification must catch what is wrong and pass what is right."""

import copy

import numpy as np
import pytest
import torch
from export_nets import KERNELS, MACS, SPEC, images, tiny
from onnx import helper, numpy_helper
from torch import nn

from prunectl.errors import UsageError, VerificationFailed
from prunectl.export import graph, onnx, verify


def edited(model, name, change):
    """The model with one initializer changed."""
    out = copy.deepcopy(model)
    tensor = next(t for t in out.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return out


def weight_of(model, position):
    node = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")][position]
    return node.input[1]


def check(network, model, batches=None):
    verify.require_same(verify.compare(network, verify.classifier(model, SPEC), batches or [images()]), "fp32")


def test_a_right_export_passes_with_numbers(network, tx2_model):
    parity = verify.compare(network, verify.classifier(tx2_model, SPEC), [images(4), images(2, seed=9)])
    assert (parity.n, parity.top1_agreement, parity.images) == (6, 100.0, "real")
    assert 0 < parity.max_abs < 1e-5  # two orders of summation in float32, logits of about 1
    assert parity.min_cosine > 1 - 1e-9
    verify.require_same(parity, "fp32")


@pytest.mark.parametrize("layer", range(5))
def test_one_perturbed_weight_is_caught(network, tx2_model, layer):
    """The largest weight of one layer off by a tenth of the layer's standard deviation."""

    def nudge(values):
        values.flat[np.abs(values).argmax()] += 0.1 * values.std()
        return values

    with pytest.raises(VerificationFailed, match="the exported graph is not the network"):
        check(network, edited(tx2_model, weight_of(tx2_model, layer), nudge))


def test_swapped_kernel_axes_are_caught(network, tx2_model):
    with pytest.raises(VerificationFailed, match="not the network"):
        check(network, edited(tx2_model, weight_of(tx2_model, 0), lambda w: w.swapaxes(2, 3)))


def test_a_swapped_image_axis_is_caught_on_real_and_on_random_images(network, tx2_model):
    swapped = copy.deepcopy(tx2_model)
    turn = helper.make_node("Transpose", ["input"], ["turned"], perm=[0, 1, 3, 2])
    back = helper.make_node("Reshape", ["turned", "shape"], ["reshaped"])
    swapped.graph.initializer.append(numpy_helper.from_array(np.array([1, *SPEC.shape]), "shape"))
    swapped.graph.node[0].input[0] = "reshaped"
    swapped.graph.node.insert(0, turn)
    swapped.graph.node.insert(1, back)
    for batches in ([images()], verify.random_batches(SPEC)):
        with pytest.raises(VerificationFailed, match="not the network"):
            check(network, swapped, batches)


def test_swapped_channels_are_caught(network, tx2_model):
    with pytest.raises(VerificationFailed):
        check(network, edited(tx2_model, weight_of(tx2_model, 0), lambda w: w[:, ::-1].copy()))


def test_a_training_mode_batch_norm_is_caught(tx2, tx2_model):
    other = tiny()
    other.bn3.running_mean += 0.05
    with pytest.raises(VerificationFailed):
        check(other, tx2_model)


def test_int8_is_judged_by_real_images_only():
    far = verify.Parity("random", 8, 3.0, 1.2, 0.1, 12.5)
    verify.require_same(far, "int8")
    with pytest.raises(VerificationFailed, match=r"top-1 agreement 12\.5 %; calibrate on more images"):
        verify.require_same(verify.Parity("real", 8, 3.0, 1.2, 0.1, 12.5), "int8")
    with pytest.raises(VerificationFailed, match="8 random images"):
        verify.require_same(far, "fp16")


def test_numbers_that_are_none_are_said_so(network, tx2_model):
    with pytest.raises(VerificationFailed, match="graph returns logits that are no finite numbers"):
        check(network, edited(tx2_model, weight_of(tx2_model, 4), lambda w: w * np.inf))


def test_no_images_is_no_proof(network, tx2_model):
    session = verify.classifier(tx2_model, SPEC)
    with pytest.raises(UsageError, match="no images"):
        verify.compare(network, session, [])
    with pytest.raises(UsageError, match="no images"):
        verify.accuracy(session, [])


def test_weights_and_work_are_counted_on_both_sides(network, tx2_model, cpu_model):
    for model in (tx2_model, cpu_model):
        found = verify.recount(network, model, SPEC)
        assert found == verify.Recount(KERNELS, KERNELS, MACS, MACS)
        verify.require_cost(found)


def test_another_network_s_graph_is_caught_by_its_cost(network, tx2):
    other = copy.deepcopy(network)
    other.point = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False))
    model = onnx.build(other, SPEC, tx2)
    with pytest.raises(VerificationFailed, match=f"needs {MACS:,} MACs"):
        verify.require_cost(verify.recount(network, model, SPEC))
    more = verify.Recount(KERNELS, KERNELS + 1, MACS, MACS)
    with pytest.raises(VerificationFailed, match=f"multiplies by {KERNELS:,} weights"):
        verify.require_cost(more)
    less = verify.require_cost(verify.Recount(KERNELS, KERNELS - 1, MACS, MACS))
    assert less and f"multiplies by {KERNELS:,} weights" in less


class Odd(nn.Module):
    """Weights that module types do not show: one standardised on the fly, one used twice, one in a list, one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(50, 50), nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        x = nn.functional.conv2d(x, w).relu_().mean((2, 3))
        return self.fc(self.fc(x).relu()) @ self.raw


def test_weights_are_found_by_their_use_not_by_their_module(tx2):
    torch.manual_seed(0)
    net = Odd().eval()
    found = verify.recount(net, onnx.build(net, SPEC, tx2), SPEC)
    assert found.kernel_params == 4 * 3 * 9 + 4 * 4 + 4 * 5
    verify.require_cost(found)


def test_accuracy_is_counted_in_percent(network, tx2_model):
    """Labels that are the network's own answers, two of six made wrong: its second choice, and its last."""
    x = images()
    with torch.no_grad():
        order = network(x).argsort(1, descending=True)
    labels = order[:, 0].clone()
    labels[0], labels[1] = order[0, 1], order[1, 4]
    found = verify.accuracy(verify.classifier(tx2_model, SPEC), [(x[:4], labels[:4]), (x[4:], labels[4:])])
    assert found == verify.Accuracy(top1=100 * 4 / 6, top5=100.0, n=6)


def test_a_pixel_graph_is_compared_on_pixels(network, tx2_model):
    spec = SPEC.of_pixels()
    model = graph.with_pixel_input(tx2_model, SPEC.mean, SPEC.std)
    between_grey_levels = images() + 0.3 / 255 / 0.2
    parity = verify.compare(network, verify.classifier(model, spec), [between_grey_levels])
    verify.require_same(parity, "fp32")


def test_random_images_are_noise_over_all_pixels_and_repeatable():
    (a,), (b,), (c,) = (verify.random_batches(SPEC, n=16, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (SPEC.mean, SPEC.std))
    pixels = np.rint((a * std + mean) * 255)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_graph_that_answers_nothing_is_not_the_network_in_any_precision(network, tx2_model):
    """Its logits are off by exactly the largest, and a zero vector points nowhere."""
    silent = edited(tx2_model, weight_of(tx2_model, 4), np.zeros_like)
    for node in silent.graph.node:
        if node.op_type == "Gemm":
            del node.input[2:]
    found = verify.compare(network, verify.classifier(silent, SPEC), [images()])
    assert found.max_rel == 1 and found.min_cosine == 0
    for precision in verify.TOLERANCE:
        with pytest.raises(VerificationFailed, match="is not the network"):
            verify.require_same(found, precision)


class Einstein(nn.Module):
    """Three things that a graph does with less work than the code: an einsum, a product of weights, a silenced layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.silent, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)
        self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) + self.norm(self.silent(x))
        y = torch.einsum("nchw,cd->ndhw", y, self.a @ self.a.T)
        return y.mean((2, 3)) @ (self.a @ self.b)


def test_a_graph_with_less_work_and_the_same_answers_passes_and_says_so(orin):
    torch.manual_seed(0)
    net = Einstein().eval()
    model = onnx.build(net, SPEC, orin)
    less = verify.require_cost(verify.recount(net, model, SPEC))
    assert less and "MACs" in less
    verify.require_same(verify.compare(net, verify.classifier(model, SPEC), [images()]), "fp32")
