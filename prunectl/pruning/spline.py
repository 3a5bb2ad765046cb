"""A ReLU network seen as a piecewise-affine spline: the regions its inputs fall in, and which units repeat a boundary.

Every ReLU splits the input space at the zero of what it is fed. The bits [fed value > 0] of all units name the region
an input lies in: its activation code. Two codes of the same inputs, taken at two moments of training, tell by the share
of differing bits how much the partition still moves. Two units whose hyperplanes nearly coincide contribute one
boundary twice: `spline_scores` ranks a layer's units by that.

Source: H. You, R. Balestriero et al., Max-Affine Spline Insights Into Deep Network Pruning, TMLR 2022. The code here is
the sign of each ReLU's INPUT, whatever calls the ReLU; the published program takes every batch norm's output instead
(`norm_code`), which in a post-activation ResNet counts values before they are summed. Codes are packed to bits layer
by layer, so that nothing of a forward pass is kept but one bit a unit."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunectl.errors import UsageError
from prunectl.pruning.modes import evaluating

_RELUS: frozenset[object] = frozenset(
    {F.relu, F.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.prelu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
    | {F.leaky_relu_, F.hardtanh_, Tensor.prelu, torch.prelu, F.rrelu, torch.rrelu}  # hardtanh is how ReLU6 may arrive
    | {F.silu, F.gelu, F.hardswish, F.mish, F.elu, F.elu_, F.celu, F.selu}  # smooth gates switch at zero too, approximately
)
NEGLIGIBLE = 1e-3  # of a layer's median norm: an L1 penalty leaves batch-norm scales near 0, never on it
_CHUNK = 64  # images a forward pass: bounds the activations alive at once


class ProbeMismatch(UsageError):
    """Two codes that were not taken from the same probe and network."""


@dataclass(frozen=True)
class LayerCode:
    """bits: (N, ceil(units/8)) uint8, most significant bit first; N probe images, `units` ReLU units kept of the layer."""

    bits: Tensor
    units: int


@dataclass(frozen=True)
class ActivationCode:
    """The code of N probe images in every ReLU layer, in the order of the forward pass, always in CPU memory."""

    layers: tuple[LayerCode, ...]

    @property
    def nbytes(self) -> int:
        return sum(c.bits.numel() for c in self.layers)

    @property
    def alive(self) -> float:
        """Share of the last layer's units whose bit is not the same for every probe image: 0 for a dead network.

        The last layer, because nothing varies behind a dead one but what passes it on a shortcut."""
        last = self.layers[-1]
        bits = last.bits.numpy()
        moved = np.bitwise_or.reduce(bits ^ bits[:1], axis=0)
        return int(np.bitwise_count(moved).sum()) / max(1, last.units)


def to_tensors(codes: Iterable[ActivationCode]) -> dict[str, Tensor]:
    """Codes as named tensors, for a checkpoint."""
    state = {}
    for i, code in enumerate(codes):
        state[f"{i}.units"] = torch.tensor([c.units for c in code.layers])
        state.update({f"{i}.{j}": c.bits for j, c in enumerate(code.layers)})
    return state


def from_tensors(state: Mapping[str, Tensor]) -> list[ActivationCode]:
    """What `to_tensors` was given; other names in `state` are left alone."""
    codes: list[ActivationCode] = []
    while (units := state.get(f"{len(codes)}.units")) is not None:
        i = len(codes)
        codes.append(ActivationCode(tuple(LayerCode(state[f"{i}.{j}"], int(u)) for j, u in enumerate(units))))
    return codes


def activation_code(model: nn.Module, probe: Tensor, *, max_bytes: int | None = None) -> ActivationCode:
    """The ReLU code of `probe` (N, C, H, W) in eval mode; the model's modes are restored.

    max_bytes: above it a fixed random subset of units per layer is kept (at least 64 of each), the same one at every
    call. A share estimated from n of a layer's units has a standard error of at most 1 / (2 sqrt(n)) per image.
    Raises UsageError when the network calls no ReLU-like function."""
    return _code(model, probe, _relu_inputs, max_bytes, "calls no ReLU, so its input-space partition has no code")


def norm_code(model: nn.Module, probe: Tensor, *, max_bytes: int | None = None) -> ActivationCode:
    """The published program's code: the sign of every batch norm's output."""
    return _code(model, probe, _norm_outputs, max_bytes, "has no batch norm, so the published code is empty")


def code_distance(a: ActivationCode, b: ActivationCode) -> float:
    """Share of (image, unit) pairs whose ReLU side differs, per layer, averaged unweighted over layers: in [0, 1].

    Independent codes are at 0.5. You et al., TMLR 2022, early-bird spline tickets. Raises ProbeMismatch."""
    shares = [differing / total for differing, total in _differences(a, b)]
    return sum(shares) / len(shares)


def bit_distance(a: ActivationCode, b: ActivationCode) -> float:
    """As `code_distance`, but every bit of the network weighs the same."""
    pairs = _differences(a, b)
    return sum(d for d, _ in pairs) / sum(t for _, t in pairs)


def canvas(first: Tensor, second: Tensor, *, side: int, extent: float = 1.0) -> Tensor:
    """The published probe: images alpha*first + beta*second, alpha and beta on a side x side grid of [-extent, extent].

    first, second: (C, H, W), here from the training split. Returns (side^2, C, H, W)."""
    ticks = torch.linspace(-extent, extent, side, device=first.device, dtype=first.dtype)
    alpha, beta = torch.meshgrid(ticks, ticks, indexing="ij")
    return alpha.reshape(-1, 1, 1, 1) * first + beta.reshape(-1, 1, 1, 1) * second


def hyperplane_distances(filters: Tensor, bias: Tensor, *, rho: float = 0.05) -> Tensor:
    """(C, C) distances of Eq. 2 between units (w, b): 1 - |cos(w_k, w_l)| + rho |b_k/|w_k| - sgn(cos) b_l/|w_l||.

    filters: (C, D) and bias: (C,), batch norm folded in. Differs from the print: the bias is divided by the filter's
    norm, since (3w, 3b) is the hyperplane of (w, b), and turns sign with the cosine, since (-w, -b) is so too."""
    offset, cosine = _normalised(filters, bias)
    return 1 - cosine.abs() + rho * (offset[:, None] - torch.where(cosine < 0, -1.0, 1.0) * offset[None, :]).abs()


def signed_distances(filters: Tensor, bias: Tensor, *, rho: float = 0.05) -> Tensor:
    """As `hyperplane_distances` with 1 - cos: units that share a boundary but open to opposite sides stay apart."""
    offset, cosine = _normalised(filters, bias)
    return 1 - cosine + rho * (offset[:, None] - offset[None, :]).abs()


def published_distances(filters: Tensor, bias: Tensor, *, rho: float = 0.05) -> Tensor:
    """Eq. 2 to the letter: raw biases, no sign."""
    _, cosine = _normalised(filters, bias)
    return 1 - cosine.abs() + rho * (bias[:, None] - bias[None, :]).abs().to(cosine.dtype)


def spline_scores(
    filters: Tensor,
    bias: Tensor,
    energy: Tensor,
    *,
    rho: float = 0.05,
    distances: Callable[..., Tensor] = hyperplane_distances,
    priced: bool = True,
) -> Tensor:
    """(C,) the price at which each unit was removed: the lower, the more redundant.

    filters: (C, D) folded filters; bias: (C,); energy: (C,) what each unit gives its readers, the spread of its output times the
    norm of the weights that read it. The price of a pair is the smaller energy times the distance, about what the readers lose when
    the weaker unit's part is left to the other; the cheapest pair loses its weaker unit, again and again, so that one pass ranks the
    layer for every ratio. Where no two are alike this ranks by energy. Units with w = 0, or nearly, are constant and come first, at
    -1; the last one standing is one above the last price. priced=False: the price is the distance alone, as published.

    The energy is not taken from |w|: batch norm folded in divides a filter by the deviation of its output, so that the units that
    hardly answer to any image have the largest filters (docs/LOG.md has what that costs)."""
    removed_at, _ = removal_order(filters, bias, energy, rho=rho, distances=distances, priced=priced)
    return removed_at


def removal_order(
    filters: Tensor,
    bias: Tensor,
    energy: Tensor,
    *,
    rho: float = 0.05,
    distances: Callable[..., Tensor] = hyperplane_distances,
    priced: bool = True,
) -> tuple[Tensor, Tensor]:
    """`spline_scores`, and for each unit the one it was a near copy of when it went ((C,) int64, -1 for none).

    O(C^2) memory; each unit keeps its nearest neighbour, so that a removal touches only the rows that pointed at it."""
    C = filters.shape[0]
    norm = filters.double().norm(dim=1)
    strength = energy.double().cpu().numpy()
    d = distances(filters, bias, rho=rho).double().cpu().numpy()
    d = np.maximum(d, d.T)  # rounding may break the symmetry that the arithmetic has
    if priced:
        d = d * np.minimum(strength[:, None], strength[None, :])
    np.fill_diagonal(d, np.inf)
    score = np.full(C, -1.0)
    keeper = np.full(C, -1)
    constant = (norm <= NEGLIGIBLE * norm.median()).cpu().numpy()
    d[constant, :] = d[:, constant] = np.inf
    nearest = d.argmin(axis=1)
    gap = d[np.arange(C), nearest]
    last = 0.0
    for _ in range(int((~constant).sum()) - 1):
        k = int(gap.argmin())
        pair = (k, int(nearest[k]))
        loser = min(pair, key=lambda u: (strength[u], u))
        last = float(gap[k])
        score[loser], keeper[loser] = last, pair[0] + pair[1] - loser
        d[loser, :] = d[:, loser] = np.inf
        gap[loser] = np.inf
        for row in np.flatnonzero(nearest == loser):
            if np.isfinite(gap[row]):
                nearest[row] = d[row].argmin()
                gap[row] = d[row, nearest[row]]
        if not np.isfinite(gap).any():
            break
    standing = (score == -1) & ~constant
    score[standing] = last + 1
    return torch.from_numpy(score), torch.from_numpy(keeper)


def _normalised(filters: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets b / |w| (C,) and cosines (C, C); a zero filter has zero cosine with everything."""
    f, b = filters.double(), bias.double()
    norm = f.norm(dim=1)
    safe = torch.where(norm > 0, norm, 1.0)
    unit = f / safe[:, None]
    return b / safe, (unit @ unit.T).clamp(-1, 1)


def _differences(a: ActivationCode, b: ActivationCode) -> list[tuple[int, int]]:
    """Differing and compared (image, unit) pairs of each layer."""
    if [(c.bits.shape, c.units) for c in a.layers] != [(c.bits.shape, c.units) for c in b.layers]:
        raise ProbeMismatch("two activation codes differ in images, layers or units: compare codes of one probe and one network only")
    pairs = []
    for x, y in zip(a.layers, b.layers, strict=True):
        differing = int(np.bitwise_count(x.bits.numpy() ^ y.bits.numpy()).sum())
        pairs.append((differing, x.bits.shape[0] * x.units))
    return pairs


_Gates = Callable[[nn.Module, Callable[[Tensor], None]], contextlib.AbstractContextManager[None]]


class _ReluInputs(TorchFunctionMode):
    """Hands every ReLU's input to `see`, whether a module, a function or a method calls it."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in _RELUS:
            x = args[0] if args else kwargs["input"]
            if not isinstance(x, nn.Parameter):  # a learned weight kept positive has no side that an image decides
                self.see(x)  # before the call, which may work in place
        return func(*args, **(kwargs or {}))  # the mode is off inside, so one ReLU is seen once


@contextlib.contextmanager
def _relu_inputs(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    with _ReluInputs(see):
        yield


@contextlib.contextmanager
def _norm_outputs(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    hooks = [m.register_forward_hook(lambda _m, _i, out: see(out)) for m in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _code(
    model: nn.Module,
    probe: Tensor,
    gates: _Gates,
    max_bytes: int | None,
    empty: str,
) -> ActivationCode:
    with evaluating(model), torch.no_grad():
        widths = _widths(model, probe, gates)
        if not any(widths):
            raise UsageError(f"{type(model).__name__} {empty}; use another detector, e.g. --detector epoch:5")
        subsets = _subsets(widths, len(probe), max_bytes, probe.device)
        packed: list[list[Tensor]] = [[] for _ in widths]
        for chunk in torch.split(probe, _CHUNK):
            calls = iter(range(len(widths)))

            def see(x: Tensor, calls: Iterator[int] = calls, chunk: Tensor = chunk) -> None:
                layer = next(calls)
                if not widths[layer]:
                    return
                bits = _channels_last(x > 0).reshape(len(chunk), -1)
                keep = subsets[layer]
                packed[layer].append(_pack(bits if keep is None else bits[:, keep]))

            with gates(model, see):
                model(chunk)
    return ActivationCode(
        tuple(
            LayerCode(torch.cat(parts), width if keep is None else len(keep))
            for parts, width, keep in zip(packed, widths, subsets, strict=True)
            if width
        )
    )


def _widths(model: nn.Module, probe: Tensor, gates: _Gates) -> list[int]:
    """Units an image of every call that `gates` sees; 0 for one that sees something else than the images, as a learned gate does."""

    def sizes(images: Tensor) -> list[int]:
        found: list[int] = []
        with gates(model, lambda x: found.append(x.numel())):  # window partitions fold space into the first dimension
            model(images)
        return found

    one = sizes(probe[:1])
    return one if len(probe) < 2 else [a if b == 2 * a else 0 for a, b in zip(one, sizes(probe[:2]), strict=True)]


def _channels_last(bits: Tensor) -> Tensor:
    """One order of a layer's units wherever they lie: any will do, and this one needs no copy where convolutions are fastest."""
    return bits.movedim(1, -1) if bits.dim() == 4 else bits


def _subsets(widths: list[int], images: int, max_bytes: int | None, device: torch.device) -> list[Tensor | None]:
    """Which units of each layer are kept: all (None), or a subset that depends on the layer's place and width only."""
    needed = images * sum(-(-w // 8) for w in widths)
    if max_bytes is None or needed <= max_bytes:
        return [None] * len(widths)
    share = max_bytes / needed
    chosen: list[Tensor | None] = []
    for layer, width in enumerate(widths):
        n = min(width, max(64, int(width * share) // 8 * 8))
        rng = np.random.default_rng(zlib.crc32(f"{layer}:{width}:{n}".encode()))
        chosen.append(None if n == width else torch.from_numpy(np.sort(rng.choice(width, n, replace=False))).to(device))
    return chosen


def _pack(bits: Tensor) -> Tensor:
    """(N, U) bool -> (N, ceil(U/8)) uint8 on the CPU."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1)) if bits.device.type == "cpu" else _pack_on_device(bits).cpu()


def _pack_on_device(bits: Tensor) -> Tensor:
    """As np.packbits, with an eighth of the bytes to bring to the CPU."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)
