import json
import subprocess
import sys

import numpy as np
import onnx as standard
import pytest
import torch
from export_nets import SPEC, Tiny, images, tiny
from torch import nn
from torch.nn import functional as F

from prunectl.errors import UsageError, VerificationFailed
from prunectl.export import graph, onnx, profiles, verify
from prunectl.export.artifact import Artifact, InputSpec, Provenance, read_record, record_path

OPERATORS = {"Conv", "Relu", "Clip", "Add", "ReduceMean", "Gemm"}


@pytest.mark.parametrize("name", ["tx2_model", "orin_model", "cpu_model"])
def test_a_built_graph_is_what_its_profile_asked_for(name, request, network):
    model = request.getfixturevalue(name)
    profile = profiles.load(name.removesuffix("_model"))
    assert graph.opset(model) == profile.opset
    assert model.ir_version <= profile.max_ir
    assert {n.op_type for n in model.graph.node} == OPERATORS  # BN folded, no Identity, no Constant left
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert all(t.data_location == standard.TensorProto.DEFAULT for t in model.graph.initializer)
    verify.require_same(verify.compare(network, verify.classifier(model, SPEC), [images()]), "fp32")


@pytest.mark.parametrize("name", ["tx2_model", "cpu_model"])
def test_nothing_of_the_exporting_machine_travels_along(name, request):
    data = request.getfixturevalue(name).SerializeToString()
    for trace in (b".py", b"torch", b"site-packages", b"Traceback"):
        assert trace not in data


def test_exporting_leaves_the_network_and_torch_as_they_were(tx2):
    net = tiny().train()
    attention, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    onnx.build(net, SPEC, tx2)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert F.scaled_dot_product_attention is attention
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_same_network_gives_the_same_bytes(tx2, tx2_model):
    assert onnx.build(tiny(), SPEC, tx2).SerializeToString(deterministic=True) == tx2_model.SerializeToString(deterministic=True)


def test_fresh_batch_norms_share_their_constants_and_leave_no_identity(tx2):
    net = Tiny().eval()  # every bias zero: torch writes one constant and Identity nodes to it
    assert "Identity" not in {n.op_type for n in onnx.build(net, SPEC, tx2).graph.node}


def test_a_free_batch_takes_any_number_of_images_and_a_fixed_one_its_own(network, orin, tx2):
    free = verify.classifier(onnx.build(network, SPEC, orin, batch=None), SPEC)
    for n in (1, 3, 5):
        verify.require_same(verify.compare(network, free, [images(n)]), "fp32")
    four = verify.classifier(onnx.build(network, SPEC, tx2, batch=4), SPEC)
    verify.require_same(verify.compare(network, four, [images(6)]), "fp32")  # a full piece of 4 and one of 2, filled up
    with pytest.raises(UsageError, match=r"dynamic batch with profile tx2.*static shapes"):
        onnx.build(network, SPEC, tx2, batch=None)
    with pytest.raises(UsageError, match="batch 0"):
        onnx.build(network, SPEC, tx2, batch=0)


class Block(nn.Module):
    """Patches, layer norm, torch's own attention layer, GELU, Hardswish: what TensorRT 8.2 has no operators for."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.fc(F.hardswish(F.gelu(tokens)).mean(1))


@pytest.mark.parametrize("name", ["tx2", "orin"])
def test_attention_and_layer_norm_are_spelled_out_for_old_readers(name):
    torch.manual_seed(0)
    net, profile = Block().eval(), profiles.load(name)
    model = onnx.build(net, SPEC, profile)
    assert {n.op_type for n in model.graph.node} <= profile.importers()
    verify.require_same(verify.compare(net, verify.classifier(model, SPEC), [images()]), "fp32")
    verify.require_cost(verify.recount(net, model, SPEC))


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}, {"enable_gqa": True}])
def test_attention_spelled_out_is_torch_attention(kwargs):
    generator = torch.Generator().manual_seed(0)
    heads = 2 if kwargs.get("enable_gqa") else 4
    q, k, v = (torch.randn(1, h, 5, 8, generator=generator) for h in (4, heads, heads))
    mask = {"bool": torch.ones(5, 5, dtype=torch.bool).tril(), "float": torch.randn(5, 5, generator=generator), None: None}[
        kwargs.pop("mask", None)
    ]
    exact = F.scaled_dot_product_attention(q, k, v, mask, **kwargs)
    torch.testing.assert_close(onnx._scaled_dot_product_attention(q, k, v, mask, **kwargs), exact)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_spelled_out_is_torch_layer_norm(affine):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    weight, bias = (torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)) if affine else (None, None)
    exact = F.layer_norm(x, (4, 5), weight, bias, 1e-3)
    torch.testing.assert_close(onnx._layer_norm(x, (4, 5), weight, bias, 1e-3), exact)


class Unexportable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x.mean(1))[:, :5]


@pytest.mark.parametrize("name", ["tx2", "cpu"])
def test_what_an_exporter_cannot_write_is_one_sentence_and_a_silent_stdout(name, capfd):
    with pytest.raises(UsageError, match=f"exporter cannot write this network for profile {name}: .*svd") as caught:
        onnx.build(Unexportable(), SPEC, profiles.load(name))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_other_logits_than_classes_are_noticed(network, tx2):
    spec = InputSpec(SPEC.shape, SPEC.mean, SPEC.std, ("a", "b"), "made-up")
    with pytest.raises(VerificationFailed, match=r"logits \(1, 5\); expected .*logits \(1, 2\)"):
        onnx.build(network, spec, tx2)


def test_an_exporter_that_writes_another_opset_is_noticed(network, cpu, tx2):
    """torch's newer exporter, asked for 13, writes 18."""
    lying = profiles.Profile("tx2", opset=13, max_opset=13, max_ir=8, exporter=cpu.exporter)
    with pytest.raises((VerificationFailed, UsageError), match=r"opset|exporter cannot write"):
        onnx.build(network, SPEC, lying)


def test_a_saved_file_tells_everything_twice(tmp_path, tx2_model, tx2):
    came_from = Provenance(run="train-tiny", pruning={"sparsity": 0.5})
    path = tmp_path / "out" / "model.onnx"
    measured = {"max_abs_diff": 1e-6, "top1_agreement": 100.0, "accuracy": 91.5}
    record = onnx.save(tx2_model, path, spec=SPEC, profile=tx2, precision="fp16", provenance=came_from, measured=measured)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.json", "model.onnx"]
    assert read_record(path) == record
    assert Artifact.from_dict(json.loads(record_path(path).read_text())) == record
    assert (record.opset, record.ir, record.batch, record.engine_flags, record.accuracy) == (13, 7, 1, ("fp16",), 91.5)
    assert record.bytes == path.stat().st_size
    texts = {p.key: p.value for p in standard.load(path).metadata_props}
    assert InputSpec.from_metadata(texts) == SPEC
    assert (texts["profile"], texts["precision"], texts["run"]) == ("tx2", "fp16", "train-tiny")
    assert json.loads(texts["pruning"]) == {"sparsity": 0.5}


def test_a_failed_lint_leaves_nothing_that_looks_finished(tmp_path, cpu_model, tx2):
    with pytest.raises(VerificationFailed, match=r"not a file for TensorRT 8\.2: .*opset 18"):
        onnx.save(cpu_model, tmp_path / "model.onnx", spec=SPEC, profile=tx2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_usage_error_without_a_partial_file(tmp_path, tx2_model, tx2):
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    with pytest.raises(UsageError, match="cannot be written"):
        onnx.save(tx2_model, tmp_path / "occupied" / "model.onnx", spec=SPEC, profile=tx2)
    assert [p.name for p in tmp_path.iterdir()] == ["occupied"]


def test_a_full_disk_leaves_no_partial_file(tmp_path, tx2_model, tx2):
    """A real limit on file size in a process of its own stands in for the full disk."""
    (tmp_path / "good.onnx").write_bytes(tx2_model.SerializeToString())
    script = f"""
import resource, signal
from pathlib import Path
from export_nets import SPEC
from prunectl.errors import UsageError
from prunectl.export import graph, onnx, profiles
model = graph.read(Path({str(tmp_path / "good.onnx")!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    onnx.save(model, Path({str(tmp_path / "out" / "model.onnx")!r}), spec=SPEC, profile=profiles.load("tx2"))
except UsageError as problem:
    print("refused:", problem)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=__file__.rpartition("/")[0], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_lowering_to_pixels_and_half_precision_keeps_the_network(network, cpu_model, cpu):
    spec = SPEC.of_pixels()
    for precision in ("fp32", "fp16"):
        model = onnx.lowered(cpu_model, spec, cpu, precision)
        session = verify.classifier(model, spec)
        verify.require_same(verify.compare(network, session, [images()]), precision)
        pixels = np.random.default_rng(0).integers(0, 256, (3, *SPEC.shape), dtype=np.uint8)
        assert session.run(pixels).shape == (3, 5)


def test_fp16_by_flag_leaves_the_graph_alone_and_int8_on_a_tx2_is_refused(tx2_model, tx2):
    assert onnx.lowered(tx2_model, SPEC, tx2, "fp16") is tx2_model
    with pytest.raises(UsageError, match="no INT8"):
        onnx.lowered(tx2_model, SPEC, tx2, "int8", [images()])
