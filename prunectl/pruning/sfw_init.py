"""SFW-Init: one learned scale per tensor, so that the first Frank-Wolfe steps from the scaled weights go down fast.

Algorithm 3 of Lu et al., ICLR 2022: the scales minimise the loss after one simulated Frank-Wolfe step. The model's own
parameters and buffers are read, never written, until the learned scales are known (`torch.func.functional_call`), so the same
code runs on any device and batch-norm statistics stay as they were. Invariant: it ends inside the constraint sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from prunectl.errors import UsageError
from prunectl.pruning.constraints import ConstraintSet, Unconstrained
from prunectl.pruning.modes import restoring_modes
from prunectl.pruning.sfw import Rescale, frank_wolfe_step

Loss = Callable[[Tensor, Tensor], Tensor]
LEAST_BATCH = 3  # images: a batch is cut in three
_TOLERANCE = 1e-6  # on the gauge, in float32 arithmetic


def sfw_init_(
    model: nn.Module,
    sets: Mapping[str, ConstraintSet],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float = 1.0,
    rescale: Rescale = "gradient",
    kappa: float = 1e-3,
    min_scale: float = 0.01,
    step_length: Literal["detached", "differentiated"] = "detached",
    loss: Loss = nn.functional.cross_entropy,
) -> dict[str, float]:
    """Every parameter w named in `sets` becomes s w, shrunk into its set where it lies outside; returns s per name.

    One iteration a batch (the paper: 390); a batch is cut into three equal parts, of which the loss before the simulated step
    sees the first two, the loss after it the first and the last. Per iteration each s gets d/ds of the loss after the step,
    clipped to [-1, 1], through Adam of rate kappa; s >= min_scale, or 0 for 1-D tensors named *bias. Tensors that are all zero,
    in no set or unconstrained keep s = 1, frozen ones stay as they are. Batch norm normalises by the batch, dropout is off.
    step_length: "detached" takes gamma as constant in s (half the cost); "differentiated" also follows gamma = lr |g| / |w - v|.
    Raises UsageError for a set that names no parameter, or a batch of fewer than three images."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(sets) - set(parameters)):
        raise UsageError(f"SFW-Init: the model has no parameter '{unknown[0]}'; make the sets from this model's named_parameters().")
    fixed = {name: p.detach() for name, p in parameters.items()}
    names = [name for name, p in parameters.items() if name in sets and _learns_scale(p, sets[name])]
    device = next(iter(fixed.values())).device
    scales = nn.Parameter(torch.ones(len(names), device=device))
    least = torch.tensor([0.0 if name.endswith("bias") else min_scale for name in names], device=device)
    adam = torch.optim.Adam([scales], lr=kappa)
    with _batch_statistics(model):
        for x, y in batches if names else ():
            gradient = _scale_gradient(model, fixed, names, sets, scales, (x, y), lr, rescale, step_length, loss)
            if gradient.isfinite().all():
                scales.grad = gradient.clamp(-1, 1)
                adam.step()
                with torch.no_grad():
                    scales.clamp_(min=least)
    learned = dict(zip(names, scales.detach().tolist(), strict=True))
    with torch.no_grad():
        for name, constraint in sets.items():
            p = parameters[name]
            if p.requires_grad:
                p.copy_(constraint.shrink(p * learned.get(name, 1.0)))
                assert constraint.gauge(p) <= 1 + _TOLERANCE
    return {name: learned.get(name, 1.0) for name in sets}


def _learns_scale(p: Tensor, constraint: ConstraintSet) -> bool:
    return p.requires_grad and not isinstance(constraint, Unconstrained) and bool(p.detach().any())


def _scale_gradient(
    model: nn.Module,
    fixed: Mapping[str, Tensor],
    names: list[str],
    sets: Mapping[str, ConstraintSet],
    scales: Tensor,
    batch: tuple[Tensor, Tensor],
    lr: float,
    rescale: Rescale,
    step_length: str,
    loss: Loss,
) -> Tensor:
    """(T,) derivatives by the T scales of the loss after one momentum-free Frank-Wolfe step from the scaled weights."""
    before, after = _overlapping(batch)
    follow_gamma = step_length == "differentiated"
    scaled = {name: s * fixed[name] for name, s in zip(names, scales.unbind(), strict=True)}
    first_loss = _loss(model, {**fixed, **scaled}, before, loss)
    tensors = list(scaled.values())
    gradients = torch.autograd.grad(first_loss, tensors, create_graph=follow_gamma, allow_unused=True, materialize_grads=True)
    moved = {}
    for (name, w), g in zip(scaled.items(), gradients, strict=True):
        if follow_gamma:
            moved[name], _ = frank_wolfe_step(w, g, sets[name], lr=lr, rescale=rescale)
        else:
            arrived, gamma = frank_wolfe_step(w.detach(), g, sets[name], lr=lr, rescale=rescale)
            moved[name] = arrived + (1 - gamma) * (w - w.detach())  # dw'/dw = 1 - gamma
    return torch.autograd.grad(_loss(model, {**fixed, **moved}, after, loss), scales)[0]


def _loss(model: nn.Module, parameters: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], loss: Loss) -> Tensor:
    buffers = {name: b.clone() for name, b in model.named_buffers()}  # batch norm writes its statistics here
    return loss(torch.func.functional_call(model, {**parameters, **buffers}, (batch[0],)), batch[1])


def _overlapping(batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Parts 0 and 1, parts 0 and 2 of a batch cut in three."""
    x, y = batch
    third = len(x) // 3
    if third == 0:
        raise UsageError(f"SFW-Init: a batch of {len(x)} cannot be cut in three; use batches of at least {LEAST_BATCH} images.")
    second = torch.cat([x[:third], x[2 * third : 3 * third]]), torch.cat([y[:third], y[2 * third : 3 * third]])
    return (x[: 2 * third], y[: 2 * third]), second


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by their batch and everything else is in eval mode; modes come back on leaving."""
    with restoring_modes(model):
        for module in model.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
