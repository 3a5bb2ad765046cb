"""What a network costs: parameters, MACs and training FLOPs, each by its own name.

A MAC is one multiply-accumulate of a convolution, a linear layer or an attention product; a FLOP count is twice that.
Elementwise work and normalisation are not counted (BN folds away in every exported file). Nothing here estimates: the
network is run once on a zero image and its operators are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunectl.pruning.modes import evaluating


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates of one forward pass of one image."""

    params: int
    macs: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


def count(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Parameters and MACs of `model` for one image of shape (C, H, W); the model is left as it was."""
    counter = FlopCounterMode(display=False)
    # with autograd on and attention as plain products, every multiplication is an operator that is counted
    with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(_zeros(model, input_shape))
    with evaluating(model), torch.no_grad():
        model(_zeros(model, input_shape))  # a network that keeps activations keeps some that can be copied
    return Cost(parameters(model), counter.get_total_flops() // 2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layer_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """MACs of every convolution and linear layer by module name, for one image of shape (C, H, W)."""
    macs: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight

            def add(_layer: nn.Module, _: object, out: Tensor, name: str = name, weight: Tensor = weight) -> None:
                macs[name] = macs.get(name, 0) + out.numel() // len(weight) * weight.numel()

            hooks.append(module.register_forward_hook(add))
    try:
        with evaluating(model), torch.no_grad():
            model(_zeros(model, input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return macs


def training_flops(macs: int, images: int) -> int:
    """FLOPs of training on `images` images: forward, and twice that for backward (3 x 2 MACs an image)."""
    return 6 * macs * images


def forward_flops(macs: int, images: int) -> int:
    return 2 * macs * images


def _zeros(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    like = next(p for p in model.parameters() if p.is_floating_point())
    return torch.zeros((1, *input_shape), device=like.device, dtype=like.dtype)
