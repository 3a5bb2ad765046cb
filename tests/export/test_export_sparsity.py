import copy

import numpy as np
import pytest
import torch
from export_nets import SPEC, tiny
from onnx import numpy_helper

from prunectl.errors import VerificationFailed
from prunectl.export import onnx, quantize, sparsity


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of every four weights along dimension 1, written plainly."""
    out = torch.zeros_like(weight)
    for o in range(weight.shape[0]):
        for block in range(0, weight.shape[1], 4):
            for position in np.ndindex(*weight.shape[2:]):
                four = weight[(o, slice(block, block + 4), *position)]
                for i in four.abs().argsort(descending=True)[:2]:
                    out[(o, block + int(i), *position)] = four[i]
    return out


@pytest.fixture(scope="module")
def sparse_network():
    net = tiny()
    with torch.no_grad():
        for layer in (net.conv2, net.point, net.fc):
            layer.weight.copy_(two_of_four(layer.weight))
    return net


@pytest.fixture(scope="module")
def sparse_model(sparse_network, orin):
    return onnx.build(sparse_network, SPEC, orin)


def edited(model, layer, change):
    out = copy.deepcopy(model)
    node = next(n for n in out.graph.node if layer in n.name and n.op_type in ("Conv", "Gemm"))
    tensor = next(t for t in out.graph.initializer if t.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), tensor.name))
    return out


def test_the_pattern_survives_export_and_folding(sparse_network, sparse_model):
    zeros = sparsity.measure(sparse_model, n=2, m=4)
    sparsity.require_pattern(zeros)
    layers = {z.layer.split("/")[1]: z for z in zeros.layers}
    assert {name: z.groups for name, z in layers.items()} == {"conv1": 0, "conv2": 288, "depthwise": 0, "point": 64, "fc": 20}
    assert all(z.broken == 0 for z in zeros.layers)  # 3 and 1 input channels hold no block of four
    assert layers["conv2"].nonzero == int((sparse_network.conv2.weight != 0).sum()) == 16 * 8 * 9 // 2
    assert "3 of 5 layers in the pattern 2:4" in zeros.statement


@pytest.mark.parametrize("layer", ["conv2", "fc"])
def test_one_value_too_many_in_one_block_is_caught(sparse_model, layer):
    def fill(values):
        values = values.copy()
        values[0, :4] = 1
        return values

    with pytest.raises(VerificationFailed, match=rf"not 2:4 sparse: 2 of 3 layers keep the pattern, e\.g\. \d of \d+ blocks of .*{layer}"):
        sparsity.require_pattern(sparsity.measure(edited(sparse_model, layer, fill), n=2, m=4))


def test_the_pattern_along_the_wrong_dimension_is_caught(orin):
    """Two of four along the output channels is no pattern that hardware skips."""
    net = tiny()
    with torch.no_grad():
        for layer in (net.conv2, net.point, net.fc):
            layer.weight.copy_(
                two_of_four(layer.weight.transpose(0, 1)).transpose(0, 1) if layer.weight.shape[0] % 4 == 0 else layer.weight
            )
    with pytest.raises(VerificationFailed, match="0 of 3 layers keep the pattern"):
        sparsity.require_pattern(sparsity.measure(onnx.build(net, SPEC, orin), n=2, m=4))


def test_a_dense_file_is_not_sparse_and_no_layer_that_could_be_may_stay_dense(sparse_model, orin_model):
    with pytest.raises(VerificationFailed, match="--constraint nm --n 2 --m 4"):
        sparsity.require_pattern(sparsity.measure(orin_model, n=2, m=4))
    dense = np.random.default_rng(0).normal(size=(16, 8, 3, 3)).astype(np.float32)
    with pytest.raises(VerificationFailed, match="2 of 3 layers keep the pattern"):
        sparsity.require_pattern(sparsity.measure(edited(sparse_model, "conv2", lambda _: dense), n=2, m=4))


def test_half_precision_keeps_the_zeros(sparse_model):
    sparsity.require_pattern(sparsity.measure(quantize.to_fp16(sparse_model), n=2, m=4))


def test_matrix_products_are_read_the_right_way_round(orin):
    """Linear over tokens is written MatMul with (in, out) weights, Gemm with (out, in)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(192, 8, bias=False), torch.nn.Flatten(), torch.nn.Linear(24, 5)).eval()
    with torch.no_grad():
        net[1].weight.copy_(two_of_four(net[1].weight))
        net[3].weight.copy_(two_of_four(net[3].weight))
    model = onnx.build(net, SPEC, orin)
    assert {n.op_type for n in model.graph.node} >= {"MatMul", "Gemm"}
    zeros = sparsity.measure(model, n=2, m=4)
    assert [(z.groups, z.broken) for z in zeros.layers] == [(8 * 48, 0), (5 * 6, 0)]


def test_zeros_without_a_pattern_save_bytes_of_a_compressed_file_only(orin_model):
    rng = np.random.default_rng(0)
    thinned = edited(orin_model, "conv2", lambda w: w * (rng.random(w.shape) < 0.1).astype(np.float32))
    dense, thin = sparsity.measure(orin_model), sparsity.measure(thinned)
    assert dense.nonzero == dense.total
    assert thin.compressed < 0.8 * dense.compressed
    assert thin.bytes == dense.bytes
    assert "% of the weights are zero in no pattern" in thin.statement
    assert "full price" in thin.statement
