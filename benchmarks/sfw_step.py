"""python -m benchmarks.sfw_step: one Frank-Wolfe step on ResNet-18 (11.17 M parameters, 62 tensors), as ratios to torch's SGD.

All arms step in turn within a round, each on its own network, so that whatever else the machine does hits them alike; reported
are medians over rounds of the ratio to the same round's `torch.optim.SGD(momentum=0.9, foreach=True)`. Gradients change every
round. Goals on 2 CPU cores: at most 4 out of the box, at most 2 compiled, on the K-sparse set. "published" is the step as the
method's authors wrote it: topk, a dense vertex, norms of everything."""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.common import header, seconds
from prunectl.errors import UsageError
from prunectl.pruning.constraints import KSparse, sets_for
from prunectl.pruning.sfw import SFW

GRADIENT_SETS = 4
WARM_UP = 15  # rounds, until the momentum has settled
LR = 0.1
ARMS = (
    ("k-sparse", "none"),
    ("k-sparse", "compiled"),
    ("k-support", "none"),
    ("k-support", "compiled"),
    ("nm", "none"),
    ("nm", "compiled"),
    ("group-k-support", "none"),
    ("lp", "none"),
    ("none", "none"),
)


def network() -> nn.Module:
    """ResNet-18 for 32 x 32 images: 3 x 3 stem, 10 classes."""
    torch.manual_seed(0)
    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def gradients(net: nn.Module) -> list[list[Tensor]]:
    """A lasting part and noise, as batches give them."""
    generator = torch.Generator().manual_seed(1)
    lasting = [1e-3 * torch.randn(p.shape, generator=generator) for p in net.parameters()]
    return [[g + 2e-3 * torch.randn(g.shape, generator=generator) for g in lasting] for _ in range(GRADIENT_SETS)]


def frank_wolfe(net: nn.Module, kind: str, kernel: str) -> SFW:
    sets = sets_for(net.named_parameters(), kind).sets
    optimizer = SFW([{"params": [p], "constraint": sets[name]} for name, p in net.named_parameters()], lr=LR, kernel=kernel)
    optimizer.feasible_()
    return optimizer


@torch.no_grad()
def published_step(params: list[Tensor], momenta: list[Tensor], sets: list[KSparse]) -> None:
    for p, m, constraint in zip(params, momenta, sets, strict=True):
        m.mul_(0.9).add_(p.grad, alpha=0.1)
        v = torch.zeros_like(m)
        top = torch.topk(m.abs().flatten(), constraint.k).indices
        v.view(-1)[top] = -constraint.radius * m.flatten()[top].sign()
        factor = min(LR * m.norm().item() / (p - v).norm().item(), 1.0)
        p.mul_(1 - factor).add_(factor * v)


def published() -> tuple[nn.Module, Callable[[], object]]:
    net = network()
    sets = list(sets_for(net.named_parameters(), "k-sparse").sets.values())
    params, momenta = list(net.parameters()), [torch.zeros_like(p) for p in net.parameters()]
    return net, lambda: published_step(params, momenta, sets)


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much the process's memory rose above its start while `work` ran (Linux: VmHWM, reset; freed memory handed back)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def temporary_memory(kind: str, kernel: str) -> float:
    """Peak memory of the first step beyond the momentum it allocates, in sizes of the largest tensor."""
    p = nn.Parameter(torch.ones(8, 8))
    p.grad = torch.ones(8, 8)
    SFW([p], constraint=KSparse(3, 1.0), kernel=kernel).step()  # code is loaded now, not while memory is measured
    net = network()
    optimizer = frank_wolfe(net, kind, kernel)
    give(net, gradients(net)[0])
    state = sum(p.numel() for p in net.parameters()) * 4
    return (peak_bytes(optimizer.step) - state) / (4 * max(p.numel() for p in net.parameters()))


def give(net: nn.Module, grads: list[Tensor]) -> None:
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = g


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    header(f"Frank-Wolfe step on ResNet-18, {rounds} rounds after {WARM_UP} of warm-up")
    base = network()
    arms: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "torch SGD, foreach": (base, torch.optim.SGD(base.parameters(), lr=1e-3, momentum=0.9, foreach=True).step),
        "published": published(),
    }
    for kind, kernel in ARMS:
        net = network()
        try:
            arms[f"{kind}{', compiled' if kernel == 'compiled' else ''}"] = (net, frank_wolfe(net, kind, kernel).step)
        except UsageError as error:
            print(f"{kind}, {kernel}: not run: {error}")
    pool = gradients(base)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + rounds):
        for name, (net, step) in arms.items():
            give(net, pool[turn % GRADIENT_SETS])
            took = seconds(step)
            if turn >= WARM_UP:
                times[name].append(took)
    reference = times["torch SGD, foreach"]
    print(f"{'arm':<28}{'ms (median)':>12}{'ratio to SGD: quartile':>26}{'median':>8}{'quartile':>10}")
    for name, taken in times.items():
        low, middle, high = statistics.quantiles((t / r for t, r in zip(taken, reference, strict=True)), n=4)
        print(f"{name:<28}{1e3 * statistics.median(taken):>12.1f}{low:>26.2f}{middle:>8.2f}{high:>10.2f}")
    print("temporary memory, in sizes of the largest tensor (9.4 MB):")
    for kind, kernel in ARMS[:-1]:
        print(f"  {kind}{', compiled' if kernel == 'compiled' else ''}: {temporary_memory(kind, kernel):.2f}")


if __name__ == "__main__":
    main()
