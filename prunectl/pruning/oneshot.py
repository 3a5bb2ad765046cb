"""One-shot pruning: weights set to zero once, by magnitude, to exact counts, with no retraining.

A plan of masks is made first (pure; name -> bool tensor, True = keep), then applied in place. Ties keep the lower index, and
the earlier tensor. Batch-norm parameters are neither ranked nor touched unless `scope="all"` asks for the published ranking of
Lu et al., ICLR 2022, over every parameter. For filters, drop lists in the form surgery takes: name of the layer -> sorted indices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning.constraints import filter_norms
from prunectl.pruning.nm import nm_mask, nm_qualifies
from prunectl.pruning.topk import top_k_mask

Scope = Literal["weights", "all"]
Masks = dict[str, Tensor]

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def prunable(model: nn.Module, scope: Scope = "weights") -> dict[str, nn.Parameter]:
    """The parameters that are ranked, by name, in model order, tied ones once: convolution and linear weights, or all there are."""
    if scope == "all":
        return dict(model.named_parameters())
    if scope != "weights":
        raise UsageError(f"scope = {scope!r}: must be weights or all.")
    named = ((f"{layer}.weight".lstrip("."), m.weight) for layer, m in model.named_modules() if isinstance(m, _WEIGHTED))
    found = {name: w for name, w in named if isinstance(w, nn.Parameter)}
    first = {id(w): name for name, w in reversed(found.items())}
    return {name: w for name, w in found.items() if first[id(w)] == name}


def global_masks(weights: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Masks that keep the largest magnitudes of all tensors together; exactly round(sparsity n) entries are dropped.

    Raises UsageError unless 0 <= sparsity < 1."""
    magnitudes = [w.detach().abs().flatten() for w in weights.values()]
    kept = _keep_largest(torch.cat(magnitudes), sparsity)
    parts = torch.split(kept, [w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def layerwise_masks(weights: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Masks that drop exactly round(sparsity n) entries of every tensor. Raises UsageError unless 0 <= sparsity < 1."""
    return {name: _keep_largest(w.detach().flatten(), sparsity).view(w.shape) for name, w in weights.items()}


def nm_masks(weights: Mapping[str, Tensor], n: int = 2, m: int = 4) -> Masks:
    """Masks that keep the n largest of every m consecutive input channels, for the tensors that qualify; others have no mask.

    Raises Unsatisfiable if none does, UsageError unless 1 <= n <= m."""
    if not 1 <= n <= m:
        raise UsageError(f"n:m = {n}:{m}: expected 1 <= n <= m, e.g. 2:4.")
    masks = {name: nm_mask(w.detach(), n, m) for name, w in weights.items() if nm_qualifies(w.shape, m)}
    if not masks:
        raise Unsatisfiable(f"{n}:{m} pruning: no layer has input channels divisible by {m}; choose another pattern or model.")
    return masks


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Zero wherever a mask says so; tensors without a mask stay as they are."""
    for name, mask in masks.items():
        weights[name].mul_(mask)


def prune_global_(model: nn.Module, sparsity: float, *, scope: Scope = "weights") -> Masks:
    """Exactly round(sparsity n) of the n ranked entries of the model are zero, the smallest ones; returns the masks."""
    weights = prunable(model, scope)
    return _applied(weights, global_masks(weights, sparsity))


def prune_layerwise_(model: nn.Module, sparsity: float, *, scope: Scope = "weights") -> Masks:
    """Exactly round(sparsity n) entries of every ranked tensor are zero; returns the masks."""
    weights = prunable(model, scope)
    return _applied(weights, layerwise_masks(weights, sparsity))


def prune_nm_(model: nn.Module, n: int = 2, m: int = 4) -> Masks:
    """At most n of every m consecutive input channels are not zero, in every layer that qualifies; returns those masks."""
    weights = prunable(model)
    return _applied(weights, nm_masks(weights, n, m))


def count_zeros(weights: Iterable[Tensor]) -> int:
    return sum(w.numel() - int(w.count_nonzero()) for w in weights)


def relative_filter_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(C,) L2 norms of each layer's C filters over the layer's largest, in [0, 1]; all 0 for a layer of zeros.

    weights: name -> (C, ...). Coupled layers must stand side by side as one entry (C, D), as `channels.describe` has them:
    `{name: c.weights for name, c in describe(model, graph).items()}`."""
    norms = {name: filter_norms(w.detach().double()) for name, w in weights.items()}
    return {name: norm / norm.max().clamp_min(torch.finfo(norm.dtype).tiny) for name, norm in norms.items()}


def small_filters(weights: Mapping[str, Tensor], *, share: float) -> dict[str, list[int]]:
    """Per layer the filters whose norm is at most `share` of the layer's largest; share = 0 names the zero filters alone.

    The drop list that `surgery.compact` takes. A layer always keeps its largest filter, the first one if all are zero; layers
    that lose nothing are left out. weights as in `relative_filter_norms`. Raises UsageError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise UsageError(f"share = {share}: must be in [0, 1), e.g. 0.01.")
    dropped = {}
    for name, norms in relative_filter_norms(weights).items():
        small = norms <= share
        small[norms.argmax()] = False
        if small.any():
            dropped[name] = small.nonzero().flatten().tolist()
    return dropped


def _keep_largest(values: Tensor, sparsity: float) -> Tensor:
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity = {sparsity}: must be in [0, 1), e.g. 0.9.")
    return top_k_mask(values, values.numel() - round(sparsity * values.numel()))


def _applied(weights: Mapping[str, Tensor], masks: Masks) -> Masks:
    apply_masks_(weights, masks)
    return masks
