"""WHEN to draw the ticket: each detector looks at the network at every probe and says when its structure has settled.

One interface: `observe(epoch, model, probe)` takes a snapshot, compares it with the last `window` snapshots and gives a
Reading; `state()` and `restore()` carry the snapshots through a checkpoint. A reading fires as long as the structure
stays settled, so the first that does is the moment; none fires on a network that says nothing: a mask that is the same
everywhere, or a dead network, is not convergence."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunectl.errors import UsageError
from prunectl.pruning.spline import ActivationCode, activation_code, code_distance, from_tensors, norm_code, to_tensors
from prunectl.registry import Registry

detectors = Registry("detector", "pruning/detectors.py")
CODES = {"relu": activation_code, "bn": norm_code}
MIN_ALIVE = 0.01  # below this share of last-layer units that tell probe images apart, a network counts as dead


@dataclass(frozen=True)
class Reading:
    """One probe: epochs trained, distances to the last snapshots (newest first), whether the detector fires, and whether the
    network says anything."""

    epoch: float
    distances: tuple[float, ...]
    fires: bool
    alive: bool = True

    @property
    def max(self) -> float | None:
        return max(self.distances, default=None)


class Detector(Protocol):
    @property
    def soonest(self) -> int:
        """The first of its looks at which it can fire."""
        ...

    def observe(self, epoch: float, model: nn.Module, probe: Tensor) -> Reading: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@detectors.register
class Spline:
    """The input-space partition: fires when the last distances between ReLU codes are all below eps (You et al. 2022).

    The published program uses code="bn", eps=0.16, window=3, one probe an epoch. Needs no pruning ratio: one search
    serves every ratio. max_bytes bounds all window + 1 codes together."""

    def __init__(self, *, eps: float = 0.16, window: int = 3, code: str = "relu", max_bytes: int = 100_000_000) -> None:
        if code not in CODES:
            raise UsageError(f"code '{code}': expected {' or '.join(CODES)}")
        self.eps, self.window, self.code = eps, _checked(window), code
        self.max_bytes = max_bytes // (window + 1)
        self.past: deque[ActivationCode] = deque(maxlen=window)

    @property
    def soonest(self) -> int:
        return self.window + 1

    def observe(self, epoch: float, model: nn.Module, probe: Tensor) -> Reading:
        code = CODES[self.code](model, probe, max_bytes=self.max_bytes)
        distances = tuple(code_distance(code, old) for old in reversed(self.past))
        full = len(self.past) == self.window
        alive = code.alive >= MIN_ALIVE
        self.past.append(code)
        return Reading(epoch, distances, full and max(distances) < self.eps and alive, alive)

    def state(self) -> dict[str, Tensor]:
        return to_tensors(self.past)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.past = deque(from_tensors(state), maxlen=self.window)


@detectors.register
class EarlyBird:
    """The batch-norm mask: fires when the channels under the global |gamma| threshold stop changing (You et al. 2020).

    Mask distance is the share of differing entries; the published settings are five masks and eps 0.1."""

    def __init__(self, *, sparsity: float, eps: float = 0.1, window: int = 5) -> None:
        self.sparsity, self.eps, self.window = sparsity, eps, _checked(window)
        self.past: deque[Tensor] = deque(maxlen=window)

    @property
    def soonest(self) -> int:
        return self.window + 1

    def observe(self, epoch: float, model: nn.Module, probe: Tensor) -> Reading:
        mask = _gamma_mask(model, self.sparsity)
        distances = tuple(float((mask != old).float().mean()) for old in reversed(self.past))
        full = len(self.past) == self.window
        alive = bool(mask.any()) and not bool(mask.all())
        self.past.append(mask)
        return Reading(epoch, distances, full and max(distances) < self.eps and alive, alive)

    def state(self) -> dict[str, Tensor]:
        return {str(i): m for i, m in enumerate(self.past)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.past = deque((state[str(i)] for i in range(len(state))), maxlen=self.window)


@detectors.register
class Epi:
    """Stable widths: fires when magnitude pruning keeps as many channels per layer as before (Shen et al. 2022).

    Layer distance |n1 - n2| / (n1 + n2); the stability is 1 minus its mean over layers, averaged over the last `window`
    probes; fires above tau and above the five values before. Widths follow the layers' fan-in: independently initialised
    networks agree to .99 (ResNet-18) or .98 (VGG-16) already, so at its usual tau it may fire on no training at all."""

    def __init__(self, *, sparsity: float, tau: float = 0.983, window: int = 5) -> None:
        self.sparsity, self.tau, self.window = sparsity, tau, _checked(window)
        self.past: deque[Tensor] = deque(maxlen=window)
        self.values: deque[float] = deque(maxlen=5)

    @property
    def soonest(self) -> int:
        return self.window + 6  # the window, five values to exceed, and one that does

    def observe(self, epoch: float, model: nn.Module, probe: Tensor) -> Reading:
        widths = _magnitude_widths(model, self.sparsity)
        distances = tuple(float(((widths - old).abs() / (widths + old).clamp(min=1)).mean()) for old in reversed(self.past))
        full = len(self.past) == self.window
        stability = 1 - sum(distances) / len(distances) if distances else 0.0
        settled = full and stability > self.tau and len(self.values) == 5 and stability > max(self.values)
        alive = bool(widths.any())
        self.past.append(widths)
        if full:
            self.values.append(stability)
        return Reading(epoch, distances, settled and alive, alive)

    def state(self) -> dict[str, Tensor]:
        return {**{str(i): w for i, w in enumerate(self.past)}, "values": torch.tensor(list(self.values), dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.past = deque((state[str(i)] for i in range(len(state.keys() - {"values"}))), maxlen=self.window)
        self.values = deque(state["values"].tolist() if "values" in state else (), maxlen=5)


@detectors.register
class Epoch:
    """A fixed moment: epoch:N draws after N epochs (N may be a fraction)."""

    def __init__(self, *, at: float) -> None:
        if not 0 <= at < math.inf:
            raise UsageError(f"detector epoch:{at:g}: the epoch must be 0 or later, e.g. epoch:3")
        self.at = at

    @property
    def soonest(self) -> int:
        return 1  # of its epoch, whatever a look would show

    def observe(self, epoch: float, model: nn.Module, probe: Tensor) -> Reading:
        return Reading(epoch, (), epoch >= self.at - 1e-9)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


def parse(spec: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """A detector's name and settings from its text: `spline`, `epoch:5`. Raises UnknownName, UsageError."""
    name, _, argument = spec.partition(":")
    name = detectors.check(name, hint="A fixed draw is written epoch:5.")
    if name != "epoch":
        if argument:
            raise UsageError(f"detector '{spec}': only epoch takes a number after the colon, e.g. epoch:5")
        return name, options
    if options:
        raise UsageError(f"detector '{spec}' draws at its epoch and looks at nothing: leave {' and '.join(sorted(options))} out")
    try:
        return name, {"at": float(argument)}
    except ValueError:
        raise UsageError(f"detector '{spec}': expected a number of epochs after the colon, e.g. epoch:5") from None


def _checked(window: int) -> int:
    if window < 1:
        raise UsageError(f"detector window = {window}: must be at least 1, e.g. 3")
    return window


def _gamma_mask(model: nn.Module, sparsity: float) -> Tensor:
    """True where |gamma| is above the share `sparsity` of all batch-norm scales; all False when they are all equal.

    Raises UsageError without any."""
    scales = [m.weight.detach().abs().flatten() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    if not scales:
        raise UsageError("detector early-bird watches batch-norm scales and this network has none; take spline or epoch:N")
    gammas = torch.cat(scales).float().cpu()
    threshold = gammas.sort().values[min(len(gammas) - 1, int(sparsity * len(gammas)))]
    return gammas > threshold if gammas.min() < gammas.max() else torch.zeros_like(gammas, dtype=torch.bool)


def _magnitude_widths(model: nn.Module, sparsity: float) -> Tensor:
    """Channels per convolution that a global threshold on the mean |weight| of a filter would keep. Raises UsageError without any."""
    norms = [m.weight.detach().float().abs().flatten(1).mean(1).cpu() for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not norms:
        raise UsageError("detector epi watches the filters of convolutions and this network has none; take spline or epoch:N")
    pooled = torch.cat(norms)
    threshold = pooled.sort().values[min(len(pooled) - 1, int(sparsity * len(pooled)))]
    return torch.tensor([float((n > threshold).sum()) for n in norms])
