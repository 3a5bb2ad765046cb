import copy

import numpy as np
import onnx as standard
import pytest
from export_nets import BIASES, KERNELS, MACS, SPEC
from onnx import TensorProto, helper, numpy_helper

from prunectl.errors import CorruptFile, UsageError, VerificationFailed
from prunectl.export import graph, onnx, verify
from prunectl.export.session import open_session


def chain(*nodes, inputs, outputs, initializers=(), opset=13):
    """A model of the given nodes; inputs and outputs are (name, shape)."""
    infos = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in some] for some in (inputs, outputs)]
    body = helper.make_graph(list(nodes), "g", *infos, [numpy_helper.from_array(v, k) for k, v in initializers])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def test_the_cost_of_a_graph_is_what_a_pencil_says(tx2_model):
    assert graph.cost(tx2_model) == graph.Cost(params=KERNELS + BIASES, kernel_params=KERNELS, macs=MACS)


def test_the_cost_is_of_one_image_whatever_the_batch(network, orin):
    four = onnx.build(network, SPEC, orin, batch=4)
    free = onnx.build(network, SPEC, orin, batch=None)
    assert graph.static_batch(four) == 4
    assert graph.static_batch(free) is None
    assert graph.cost(four) == graph.cost(free)
    assert graph.cost(free).macs == MACS


@pytest.mark.parametrize(
    ("operator", "weight", "data", "out", "macs"),
    [
        ("Conv", (4, 2, 3, 3), (1, 2, 8, 8), (1, 4, 6, 6), 4 * 6 * 6 * 2 * 9),
        ("ConvTranspose", (2, 4, 3, 3), (1, 2, 8, 8), (1, 4, 10, 10), 2 * 8 * 8 * 4 * 9),
        ("Gemm", (7, 3), (2, 7), (2, 3), 7 * 3),  # two images, of which one is counted
        ("MatMul", (7, 3), (1, 5, 7), (1, 5, 3), 5 * 7 * 3),
    ],
)
def test_macs_of_each_product(operator, weight, data, out, macs):
    node = helper.make_node(operator, ["x", "w"], ["y"])
    model = chain(node, inputs=[("x", data)], outputs=[("y", out)], initializers=[("w", np.ones(weight, np.float32))])
    assert graph.cost(model) == graph.Cost(np.prod(weight), np.prod(weight), macs)


def test_a_shape_that_cannot_be_inferred_is_no_zero():
    nodes = [helper.make_node("Reshape", ["x", "s"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    ones = ("w", np.ones((4, 2), np.float32))
    model = chain(*nodes, inputs=[("x", (1, 8)), ("s", (2,))], outputs=[("y", None)], initializers=[ones])
    with pytest.raises(VerificationFailed, match="shapes cannot be inferred"):
        graph.cost(model)


def test_identities_vanish_and_the_function_stays():
    nodes = [
        helper.make_node("Identity", ["b"], ["b1"]),
        helper.make_node("Identity", ["b1"], ["b2"]),
        helper.make_node("Add", ["x", "b2"], ["s"]),
        helper.make_node("Identity", ["s"], ["y"]),
    ]
    bias = ("b", np.array([1.0, 2.0], np.float32))
    model = chain(*nodes, inputs=[("x", (1, 2))], outputs=[("y", (1, 2))], initializers=[bias])
    clean = graph.without_identities(model)
    assert [n.op_type for n in clean.graph.node] == ["Add", "Identity"]  # the last one makes the output's name
    assert len(model.graph.node) == 4
    x = np.array([[3.0, 4.0]], np.float32)
    run = [open_session(m.SerializeToString()).run(None, {"x": x})[0] for m in (model, clean)]
    np.testing.assert_array_equal(*run)


def test_pixels_put_in_front_equal_normalising_on_the_host(tx2_model):
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SPEC.shape), dtype=np.uint8)
    fed = graph.with_pixel_input(tx2_model, SPEC.mean, SPEC.std)
    plain = verify.classifier(tx2_model, SPEC)
    raw = open_session(fed.SerializeToString()).run(None, {"input": pixels})[0]
    # the same two operations on the same float32 constants: equal to the last bit or one rounding
    np.testing.assert_allclose(raw, plain.run(pixels), rtol=1e-6, atol=1e-6)
    assert graph.cost(fed) == graph.cost(tx2_model)
    with pytest.raises(UsageError, match="not float32"):
        graph.with_pixel_input(fed, SPEC.mean, SPEC.std)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x07" + b"\xff" * 40])
def test_a_corrupt_file_is_said_to_be_corrupt(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"m\.onnx"):
        graph.read(path)


def test_half_a_file_is_corrupt_and_no_file_is_a_usage_error(tmp_path, tx2_model):
    data = tx2_model.SerializeToString()
    path = tmp_path / "half.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFile):
        graph.read(path)
    with pytest.raises(UsageError, match="not a file"):
        graph.read(tmp_path / "none.onnx")


def test_weights_in_a_missing_file_are_named(tmp_path, tx2_model):
    standard.save(copy.deepcopy(tx2_model), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    with pytest.raises(CorruptFile, match="weights in other files"):
        graph.read(tmp_path / "m.onnx")
