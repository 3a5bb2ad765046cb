import pytest
from export_nets import SPEC, tiny

from prunectl.export import onnx, profiles


@pytest.fixture(scope="session")
def network():
    return tiny()


@pytest.fixture(scope="session")
def tx2():
    return profiles.load("tx2")


@pytest.fixture(scope="session")
def orin():
    return profiles.load("orin")


@pytest.fixture(scope="session")
def cpu():
    return profiles.load("cpu")


@pytest.fixture(scope="session")
def tx2_model(network, tx2):
    return onnx.build(network, SPEC, tx2)


@pytest.fixture(scope="session")
def orin_model(network, orin):
    return onnx.build(network, SPEC, orin)


@pytest.fixture(scope="session")
def cpu_model(network, cpu):
    """Written by torch's newer exporter, which takes seconds: one graph for all tests of cpu, gpu and rtx."""
    return onnx.build(network, SPEC, cpu)
