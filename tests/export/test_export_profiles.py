import pytest

from prunectl.errors import UnknownName, UsageError
from prunectl.export.profiles import load, profiles

ALL = ["cpu", "gpu", "orin", "rtx", "tx2"]


def test_the_five_profiles_are_listed_with_their_help():
    assert profiles.names() == ALL
    assert all(profiles.help().values())


@pytest.mark.parametrize("name", ALL)
def test_a_profile_writes_what_its_reader_reads(name):
    profile = load(name)
    assert profile.name == name
    assert profile.opset <= profile.max_opset
    assert profile.round_to == 8
    importers = profile.importers()
    assert importers is None or {"Conv", "Gemm", "Relu", "Add", "MaxPool", "GlobalAveragePool"} <= importers


def test_the_importers_of_tensorrt_8_2_are_148_and_grow_with_its_version():
    old, middle, new = (load(name).importers() for name in ("tx2", "orin", "gpu"))
    assert len(old) == 148
    assert old < middle
    assert "HardSwish" in middle - old
    assert "LayerNormalization" in new - middle


def test_int8_on_a_tx2_is_refused_with_the_reason():
    with pytest.raises(UsageError, match=r"int8 with profile tx2: its GPU \(sm_62, Pascal\) has no INT8.*use fp32 or fp16"):
        load("tx2").check_precision("int8")
    load("tx2").check_precision("fp16")


def test_precision_lives_in_the_graph_or_in_a_flag():
    orin, gpu = load("orin"), load("gpu")
    assert [orin.graph_precision(p) for p in ("fp32", "fp16", "int8")] == ["fp32", "fp32", "int8"]
    assert [gpu.graph_precision(p) for p in ("fp32", "fp16", "int8")] == ["fp32", "fp16", "int8"]
    assert orin.engine_flags("int8") == ("int8", "fp16")
    assert {gpu.engine_flags(p) for p in ("fp32", "fp16", "int8")} == {()}


def test_two_of_four_sparsity_is_offered_where_it_gains():
    load("orin").check_sparsity("2:4")
    with pytest.raises(UsageError, match=r"2:4 with profile tx2.*gpu or orin or rtx"):
        load("tx2").check_sparsity("2:4")


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean tx2"):
        load("tx1")
