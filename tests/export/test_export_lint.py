"""Deliberately wrong files, one for each rule; and files that real TensorRT versions take, which must pass."""

import copy

import numpy as np
import onnx as standard
import pytest
from export_nets import SPEC, images
from onnx import TensorProto, helper, numpy_helper

from prunectl.errors import CorruptFile, VerificationFailed
from prunectl.export import graph, lint, onnx, profiles, quantize

ONES = np.ones((4, 4, 3, 3), np.float32)
BIAS = np.ones(4, np.float32)


def model_of(*nodes, initializers=None, opset=13, ir=7, kind=TensorProto.FLOAT, out=None, functions=()):
    """x (1, 4, 8, 8) -> nodes -> y, valid but for what a test puts in."""
    infos = helper.make_tensor_value_info("x", kind, (1, 4, 8, 8)), helper.make_tensor_value_info("y", kind, out)
    constants = [numpy_helper.from_array(v, k) for k, v in (initializers or {}).items()]
    body = helper.make_graph(list(nodes), "g", [infos[0]], [infos[1]], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    opsets += [helper.make_opsetid(f.domain, 1) for f in functions]
    return standard.shape_inference.infer_shapes(helper.make_model(body, opset_imports=opsets, ir_version=ir, functions=functions))


def errors(model, name="tx2"):
    return [f for f in lint.lint(model, profiles.load(name)) if f.severity == "error"]


def only(model, rule, name="tx2"):
    """The one error of a file, which is of `rule`."""
    found = errors(model, name)
    assert [f.rule for f in found] == [rule], found
    return found[0]


def test_what_a_profile_writes_has_no_finding(tx2_model, orin_model, cpu_model):
    for name, model in (("tx2", tx2_model), ("orin", orin_model), ("cpu", cpu_model), ("gpu", cpu_model), ("rtx", cpu_model)):
        assert lint.lint(model, profiles.load(name)) == []


def test_a_newer_opset_is_an_error_that_says_why(cpu_model):
    found = {f.rule: f for f in errors(cpu_model)}
    assert "opset 18, and TensorRT 8.2 reads up to 13 and mis-reads newer operators without a word" in str(found["opset"])
    assert "IR version 10" in str(found["ir"])
    assert "--profile tx2" in found["opset"].remedy


def test_an_opset_18_reduce_mean_would_average_over_everything(cpu_model):
    found = next(f for f in errors(cpu_model) if f.rule == "reduced-axes")
    assert found.operator == "ReduceMean"
    assert found.node
    assert "over ALL axes" in found.message


def test_a_reduce_mean_with_two_inputs_is_caught_even_when_the_opset_lies():
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], "mean", keepdims=0)
    axes = {"axes": np.array([2, 3])}
    model = model_of(node, initializers=axes, opset=18)
    model.opset_import[0].version = 13
    assert {"valid", "reduced-axes"} <= {f.rule for f in errors(model)}


def test_an_identity_bias_is_caught_with_its_node_and_remedy():
    nodes = [helper.make_node("Identity", ["b"], ["b2"], "share"), helper.make_node("Conv", ["x", "w", "b2"], ["y"], "conv")]
    model = model_of(*nodes, initializers={"w": ONES, "b": BIAS})
    found = only(model, "constant-operands")
    assert (found.node, found.operator, found.remedy) == ("conv", "Conv", "fold the Identity nodes")
    assert found.message == "its bias 'b2' is no initializer but the output of Identity 'share'"
    assert str(found).startswith("Conv 'conv': its bias") and str(found).endswith("[constant-operands]")
    assert errors(graph.without_identities(model)) == []


def test_a_constant_node_is_as_good_as_an_initializer():
    constant = helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(BIAS))
    assert errors(model_of(constant, helper.make_node("Conv", ["x", "w", "b"], ["y"]), initializers={"w": ONES})) == []


def test_computed_weights_are_caught():
    nodes = [helper.make_node("Mul", ["w", "s"], ["w2"]), helper.make_node("Conv", ["x", "w2"], ["y"], "conv")]
    found = only(model_of(*nodes, initializers={"w": ONES, "s": np.float32([2])}), "constant-operands")
    assert "its weight 'w2'" in found.message


@pytest.mark.parametrize(
    ("operator", "opset", "remedy"),
    [("HardSwish", 14, "HardSigmoid"), ("Gelu", 20, "Erf"), ("Mish", 18, "Softplus"), ("IsInf", 10, "keep it out")],
)
def test_operators_without_an_importer_are_named_with_a_remedy(operator, opset, remedy):
    model = model_of(helper.make_node(operator, ["x"], ["y"], "act"), opset=opset)
    found = next(f for f in errors(model) if f.rule == "operators")
    assert (found.node, found.operator) == ("act", operator)
    assert remedy in found.remedy


def test_operators_inside_branches_are_seen():
    branch = helper.make_graph([helper.make_node("Mish", ["x"], ["z"], "hidden")], "then", [], [helper.make_empty_tensor_value_info("z")])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["z2"])], "else", [], [helper.make_empty_tensor_value_info("z2")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    assert "hidden" in [f.node for f in errors(model_of(node, initializers={"c": np.array(True)}, opset=18)) if f.rule == "operators"]


def test_a_graph_optimised_by_onnx_runtime_is_refused_by_tensorrt_and_taken_by_itself():
    model = model_of(
        helper.make_node("FusedConv", ["x", "w"], ["y"], "fused", domain="com.microsoft"), initializers={"w": ONES}, out=(1, 4, 6, 6)
    )
    assert "ONNX Runtime has optimised" in only(model, "operators").remedy
    assert errors(model, "cpu") == []


def test_open_shapes_are_refused_where_shapes_are_static(network, orin):
    free = onnx.build(network, SPEC, orin, batch=None)
    assert "static-shapes" in {f.rule for f in errors(free)}
    assert errors(free, "orin") == []


@pytest.mark.parametrize(
    ("kind", "remedy"), [(TensorProto.DOUBLE, "float32"), (TensorProto.UINT8, "--uint8-input"), (TensorProto.BFLOAT16, "FP32")]
)
def test_types_that_tensorrt_8_2_has_not(kind, remedy):
    operator = "Relu" if kind != TensorProto.UINT8 else "Transpose"
    found = errors(model_of(helper.make_node(operator, ["x"], ["y"]), kind=kind))
    assert {f.rule for f in found} == {"types"}
    assert remedy in found[0].remedy


def test_a_double_hidden_in_a_cast_or_a_constant_is_seen():
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], "up", to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["d", "two"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    found = errors(model_of(*nodes, initializers={"two": np.float64([2])}))
    assert "up" in [f.node for f in found]
    assert {f.rule for f in found} == {"types"}


def test_quantised_files_by_target(cpu_model, orin_model, orin):
    for_tensorrt = quantize.for_tensorrt(orin_model, [images()])
    for_cpu = quantize.for_cpu(cpu_model, [images()])
    assert errors(for_tensorrt, "orin") == []
    assert errors(for_cpu, "cpu") == []
    refused = only(for_tensorrt_as_opset_13(for_tensorrt), "quantisation")
    assert "no INT8" in refused.message
    messages = {f.message for f in errors(for_cpu, "gpu")}
    assert {"TensorRT takes zero points of 0 only", "TensorRT has no INT32 biases"} <= messages


def for_tensorrt_as_opset_13(model):
    """The same nodes, which exist since opset 13, under a number that a TX2 takes."""
    older = copy.deepcopy(model)
    older.opset_import[0].version = 13
    return older


def test_pooling_that_no_tensorrt_has():
    dilated = model_of(helper.make_node("MaxPool", ["x"], ["y"], "pool", kernel_shape=[2, 2], dilations=[2, 2]))
    indexed = model_of(helper.make_node("MaxPool", ["x"], ["y", "where"], "pool", kernel_shape=[2, 2]))
    assert "dilated" in only(dilated, "pooling").message
    assert "indices" in only(indexed, "pooling", "gpu").message


def test_cubic_resize_and_half_precision_clip_bounds_are_for_newer_tensorrt():
    resize = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic")
    model = model_of(resize, initializers={"s": np.float32([1, 1, 2, 2])})
    assert "bilinear" in only(model, "resizing").remedy
    assert errors(model, "orin") == []
    clip = model_of(
        helper.make_node("Clip", ["x", "lo", "hi"], ["y"]),
        initializers={"lo": np.float16(0), "hi": np.float16(6)},
        kind=TensorProto.FLOAT16,
    )
    assert {f.rule for f in errors(clip)} == {"clip-bounds"}
    assert errors(clip, "orin") == []


def test_no_tensorrt_smooths_while_it_shrinks():
    resize = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)
    model = model_of(resize, initializers={"s": np.float32([1, 1, 0.5, 0.5])}, opset=18)
    for profile in ("gpu", "orin", "tx2"):  # the older ones cannot read its opset either
        assert any("antialiased" in f.message for f in errors(model, profile)), profile


def test_functions_of_a_file_are_for_newer_tensorrt():
    """The importers of 8.2 and 8.5 do not look for them."""
    body = [helper.make_node("Relu", ["a"], ["b"])]
    mine = helper.make_function("mine", "Mine", ["a"], ["b"], body, [helper.make_opsetid("", 13)])
    model = model_of(helper.make_node("Mine", ["x"], ["y"], domain="mine"), functions=[mine], ir=8)
    for profile, known in (("tx2", False), ("orin", False), ("gpu", True), ("cpu", True)):
        assert ("operators" not in {f.rule for f in errors(model, profile)}) == known, profile


def test_constants_of_a_branch_are_constants():
    """Axes that an If body holds itself are as fixed as those of the graph."""
    inner = [helper.make_node("Unsqueeze", ["x", "axes"], ["u"]), helper.make_node("Squeeze", ["u", "axes"], ["y1"])]
    axes = numpy_helper.from_array(np.array([0], dtype=np.int64), "axes")

    def branch(name: str) -> standard.GraphProto:
        return helper.make_graph(inner, name, [], [helper.make_tensor_value_info("y1", TensorProto.FLOAT, None)], [axes])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("then"), else_branch=branch("else"))
    view = lint.View(model_of(node, initializers={"c": np.array(True)}))
    assert view.constant("axes") is not None


def test_warnings_do_not_stop_a_file(tx2):
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv")
    norm = helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["i"], "bn")
    last = helper.make_node("Identity", ["i"], ["y"], "same")
    found = lint.lint(model_of(conv, norm, last, initializers={"w": ONES, "s": BIAS}), tx2)
    assert {f.rule for f in found} == {"folded-norms", "identities", "widths"}
    assert {f.severity for f in found} == {"warning"}
    lint.require_clean(found, tx2)


def test_weights_outside_the_file_are_a_warning(tmp_path, tx2_model, tx2):
    standard.save(copy.deepcopy(tx2_model), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    light = standard.load(tmp_path / "m.onnx", load_external_data=False)
    assert "one-file" in {f.rule for f in lint.one_file(lint.View(light), tx2)}
    (found,) = lint.lint(tmp_path / "m.onnx", tx2)
    assert (found.rule, found.severity) == ("one-file", "warning")


def test_an_invalid_graph_is_a_finding_and_a_corrupt_file_an_error(tmp_path, tx2):
    loose = model_of(helper.make_node("Relu", ["x"], ["y"]))
    loose.graph.node[0].input[0] = "nothing"
    assert "valid" in {f.rule for f in errors(loose)}
    (tmp_path / "m.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(CorruptFile):
        lint.lint(tmp_path / "m.onnx", tx2)


def test_require_clean_names_three_and_counts_the_rest(cpu_model, tx2):
    findings = lint.lint(cpu_model, tx2)
    with pytest.raises(VerificationFailed, match=r"not a file for TensorRT 8\.2: .*ReduceMean"):
        lint.require_clean(findings, tx2)
    with pytest.raises(VerificationFailed, match="and 3 more"):
        lint.require_clean(findings[:1] * 6, tx2)


def test_every_rule_has_a_wrong_file_in_this_module():
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    names = [rule.__name__.replace("_", "-") for rule in lint.RULES]
    assert [n for n in names if f'"{n}"' not in text] == []
