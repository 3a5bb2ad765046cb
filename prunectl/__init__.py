"""prunectl: from data set to pruned, verified, measured image classifier on an edge board.

As a library, `load` rebuilds a saved network and `load_onnx_session` opens an exported one; importing this package
alone imports neither torch nor ONNX Runtime."""

__version__ = "0.1.0"
