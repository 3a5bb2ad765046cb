"""A torch module as a file that the agent can train on a board: traced in train() mode, so that BatchNorm and Dropout train there.

torch 1.10 (the last for JetPack 4) loads and trains a file traced by torch 2; a scripted one aborts it. Nothing of the module
is changed by this: it is a copy that is traced."""

from __future__ import annotations

import copy
import io
import warnings

import torch
from torch import nn
from torch.jit._trace import TracerWarning


def trace_training(module: nn.Module, input_shape: tuple[int, int, int, int]) -> bytes:
    """The TorchScript file of `module` in train() mode for inputs (N, C, H, W)."""
    twin = copy.deepcopy(module).cpu().float().train()
    x = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)  # torch.export has no reader in torch 1.10
        warnings.simplefilter("ignore", category=TracerWarning)  # shapes are fixed here
        traced = torch.jit.trace(twin, x, check_trace=False)  # two runs in train() mode differ by nature
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    return buffer.getvalue()
