"""The training loop and its parts against a few plain lines of torch."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunectl import data
from prunectl.errors import UsageError
from prunectl.training.evaluate import accuracy
from prunectl.training.gradients import mean_gradients
from prunectl.training.loop import Diverged, Objective, TrainState, steps
from prunectl.training.optimizers import load_state_tensors, momentum_of, set_momentum, sgd, state_tensors
from prunectl.training.precision import place
from prunectl.training.schedule import learning_rate

CPU = place("cpu", "fp32")
CLASSES = 7


class _Data:
    """Eight batches of five images, the same in every epoch but in another order."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.batches = [(torch.randn(5, 2, 6, 6, generator=g), torch.randint(CLASSES, (5,), generator=g)) for _ in range(8)]

    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, drop_last: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(100 * seed + epoch)).tolist()
        return iter([self.batches[i] for i in order])


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(96, CLASSES))


def _state(net: nn.Module, **kwargs) -> TrainState:
    return TrainState(net, sgd(net, lr=1.0, momentum=0.9, nesterov=False, weight_decay=1e-3), **kwargs)


def _train(state: TrainState, *, epochs: int, data: _Data | None = None, lr: float = 0.05, **objective: float | None) -> list:
    running = steps(
        state, data or _Data(), CPU, lambda done: lr * (1 - done), epochs=epochs, steps_per_epoch=8, batch_size=5, seed=3,
        objective=Objective(**objective),
    )  # fmt: skip
    return list(running)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_two_epochs_are_what_a_plain_loop_does(smoothing, l1):
    ours, plain = _net(), _net()
    seen = _train(_state(ours), epochs=2, label_smoothing=smoothing, l1_gammas=l1)
    optimizer, data, step = torch.optim.SGD(plain.parameters(), lr=1, momentum=0.9, weight_decay=1e-3), _Data(), 0
    plain.train()
    for epoch in range(2):
        torch.manual_seed(3 * 1_000_003 + epoch)
        for x, y in data.train_batches(epoch, batch_size=5, seed=3):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 16)
            optimizer.zero_grad()
            penalty = l1 * plain[1].weight.abs().sum()
            (F.cross_entropy(plain(CPU.images(x)), y, label_smoothing=smoothing) + penalty).backward()
            optimizer.step()
            step += 1
    # the penalty's gradient is added after backward here and summed inside it there: one rounding apart
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert [s.done for s in seen] == pytest.approx([i / 8 for i in range(1, 17)])
    assert [bool(s.summary) for s in seen] == [(i % 8 == 7) for i in range(16)]


def test_an_epoch_does_not_hang_on_what_random_numbers_were_drawn_before():
    whole, cut = _net(), _net()
    one, two = _state(whole), _state(cut)
    _train(one, epochs=3)
    _train(two, epochs=2, lr=0.05)
    two_again = _state(cut, epoch=2)
    two_again.optimizer = two.optimizer
    reference = _net()
    ref = _state(reference)
    _train(ref, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(cut.state_dict().values(), reference.state_dict().values(), strict=True))
    torch.rand(17)  # between the epochs
    data, rate = _Data(), lambda done: 0.05 * (1 - done)
    for state in (two_again, ref):
        list(steps(state, data, CPU, rate, epochs=3, steps_per_epoch=8, batch_size=5, seed=3))
        torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(cut.state_dict().values(), reference.state_dict().values(), strict=True))


def test_the_average_is_the_exponential_one():
    net = _net()
    state = _state(net, average={k: v.clone() for k, v in net.state_dict().items()})
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    for s in steps(state, _Data(), CPU, lambda _: 0.05, epochs=1, steps_per_epoch=8, batch_size=5, seed=0, objective=Objective(ema=0.3)):
        kept = min(0.3, s.index / (9 + s.index))  # 0.1, 0.18, 0.25, 0.3, 0.3, ...
        for k, v in net.state_dict().items():
            expected[k] = kept * expected[k] + (1 - kept) * v if v.is_floating_point() else v.clone()
    assert state.average is not None
    assert all(torch.allclose(state.average[k], v, rtol=1e-5, atol=1e-7) for k, v in expected.items())


def test_the_body_may_put_another_network_in_the_middle_of_an_epoch():
    first, second = _net(0), _net(1)
    state, before = _state(first), copy.deepcopy(second.state_dict())
    for i, _ in enumerate(steps(state, _Data(), CPU, lambda _: 0.05, epochs=1, steps_per_epoch=8, batch_size=5, seed=0)):
        if i == 3:
            state.model, state.optimizer = second, _state(second).optimizer
            kept = copy.deepcopy(first.state_dict())
    assert all(torch.equal(t, kept[k]) for k, t in first.state_dict().items())
    assert not torch.equal(second.state_dict()["0.weight"], before["0.weight"])


def test_a_teacher_pulls_the_answers_towards_its_own():
    net, teacher = _net(0), _net(1).eval()
    pupil, alone = _state(net, teacher=teacher), _state(_net(0))
    _train(pupil, epochs=4, distill=1.0)
    _train(alone, epochs=4)
    x = torch.cat([x for x, _ in _Data().batches])

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return F.kl_div(F.log_softmax(model.eval()(x), 1), F.log_softmax(teacher(x), 1), log_target=True, reduction="batchmean").item()

    assert distance(pupil.model) < 0.5 * distance(alone.model)


def test_a_loss_that_is_not_finite_stops_with_the_moment():
    data = _Data()
    data.batches[5] = (torch.full((5, 2, 6, 6), math.nan), data.batches[5][1])
    with pytest.raises(Diverged, match=r"after 1\.00 epochs.*train\.lr"):
        _train(_state(_net()), epochs=2, data=data)


def test_accuracy_is_the_counted_one_and_modes_come_back():
    net, batches = _net(), _Data().batches
    net[1].eval()
    modes = [m.training for m in net.modules()]
    found = accuracy(net, batches, CPU)
    assert [m.training for m in net.modules()] == modes
    net.eval()
    with torch.no_grad():
        logits, y = torch.cat([net(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    order = logits.argsort(1, descending=True)
    assert found.images == 40
    assert found.top1 == pytest.approx(100 * (order[:, 0] == y).float().mean().item())
    assert found.top5 == pytest.approx(100 * (order[:, :5] == y[:, None]).any(1).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_top5_of_five_classes_says_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    assert accuracy(net, [(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.long))], CPU).top5 is None


def test_mean_gradients_are_those_of_the_mean_loss():
    net, batches = _net(), _Data().batches
    found = mean_gradients(net, batches, CPU)
    net.eval()
    loss = torch.stack([F.cross_entropy(net(x), y) for x, y in batches]).mean()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    assert all(torch.allclose(found[n], g, atol=1e-6) for (n, _), g in zip(net.named_parameters(), expected, strict=True))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_comes_back_by_name(layout):
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = _net().to(memory_format=layout)
        return net, sgd(net, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        x, y = _Data().batches[i]
        optimizer.zero_grad()
        F.cross_entropy(net.eval()(x), y).backward()
        optimizer.step()

    net, optimizer = fresh()
    step(net, optimizer, 0)
    other, its = fresh()
    other.load_state_dict(net.state_dict())
    load_state_tensors(other, its, {k: t.clone() for k, t in state_tensors(net, optimizer).items()})
    step(net, optimizer, 1)
    step(other, its, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    momentum = {k: 2 * m for k, m in momentum_of(net, optimizer).items()}
    set_momentum(net, optimizer, momentum)
    assert all(torch.equal(m, momentum[k]) for k, m in momentum_of(net, optimizer).items()) and momentum


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_schedules(schedule):
    def rate(done: float) -> float:
        return learning_rate(done, lr=0.4, schedule=schedule, milestones=(0.5, 0.75), warmup=0.1)

    assert rate(0) == pytest.approx(0.04) and rate(0.05) == pytest.approx(0.22)
    values = [rate(0.1 + 0.9 * i / 100) for i in range(100)]
    assert values[0] == pytest.approx(0.4) and values == sorted(values, reverse=True)
    last = {"multistep": 0.004, "cosine": 0.0, "constant": 0.4}[schedule]
    assert rate(1 - 1e-9) == pytest.approx(last, abs=1e-6)


def test_multistep_divides_at_the_milestones():
    values = [learning_rate(d, lr=1.0, schedule="multistep", milestones=(0.5, 0.75)) for d in (0.49, 0.5, 0.74, 0.75)]
    assert values == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_placement(precision, dtype):
    p = place("cpu", precision)
    assert (p.autocast_dtype, p.channels_last, p.name) == (dtype, True, precision)
    with p.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == (dtype or torch.float32)
    assert place("auto", "auto").name in ("fp32", "bf16")


def test_the_cpu_keeps_the_memory_that_a_step_frees():
    script = """
import resource, torch
from prunectl.training.precision import place
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB, 16384 pages: more than the C library keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
place("cpu", "fp32")
faults()
print(faults())
"""
    assert int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout) < 16384 / 4


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "mps", "meta", ""])
def test_a_device_that_is_none(device):
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        place(device, "auto")


@pytest.mark.parametrize("images", [100, 127])
def test_an_epoch_of_one_batch_is_one_step(images: int) -> None:
    """Images beyond the batch sit out, here as in longer epochs."""
    few, net = data.load("fashion-mini", train_images=images), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    state = TrainState(net, sgd(net, lr=0.01, momentum=0.9, nesterov=False, weight_decay=0))
    seen = list(steps(state, few, CPU, lambda done: 0.01, epochs=3, steps_per_epoch=1, batch_size=100, seed=0))
    assert [(s.done, s.index, s.images, s.summary is not None) for s in seen] == [(e, 1, 100, True) for e in (1, 2, 3)]


def test_frozen_layers_have_gradients_to_rank_by():
    """Their channels may go too; by a gradient of 0 they would go in the order of their numbers."""
    net = _net()
    first = next(iter(net.parameters())).requires_grad_(False)
    frozen = mean_gradients(net, [(torch.rand(4, 2, 6, 6), torch.arange(4) % 2)], place("cpu", "fp32"))
    assert next(iter(frozen.values())).abs().sum() > 0 and not first.requires_grad


def test_tensors_of_any_rank_are_placed():
    module = nn.ModuleDict({"3d": nn.Conv3d(1, 2, 3), "2d": nn.Conv2d(4, 4, 3)})
    placed = place("cpu", "fp32").put(module)
    assert placed["2d"].weight.is_contiguous(memory_format=torch.channels_last) and placed["3d"].weight.is_contiguous()
