"""prunectl: from data set to pruned, verified, measured image classifier on an edge board.

As a library, `load` rebuilds a saved network and `load_onnx_session` opens an exported one; importing this package
alone imports neither torch nor ONNX Runtime."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunectl.export.session import load_onnx_session
    from prunectl.training.compactmodel import load
    from prunectl.workflows.find_ticket import find_ticket
    from prunectl.workflows.sfw_prune import sfw_prune
    from prunectl.workflows.train import train

_HOMES = {
    "load": "training.compactmodel",
    "load_onnx_session": "export.session",
    "train": "workflows.train",
    "find_ticket": "workflows.find_ticket",
    "sfw_prune": "workflows.sfw_prune",
}
__all__ = ["__version__", "find_ticket", "load", "load_onnx_session", "sfw_prune", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunectl' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"prunectl.{_HOMES[name]}"), name)
