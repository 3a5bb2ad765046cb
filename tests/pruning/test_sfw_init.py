"""SFW-Init: gradients of the scales against finite differences, feasibility at the end, nothing else touched."""

import pytest
import torch
from torch import nn

from prunectl.errors import UsageError
from prunectl.pruning import constraints as c
from prunectl.pruning import sfw_init
from prunectl.pruning.sfw_init import sfw_init_


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )
    return net.to(dtype)


def batches(n, size=18, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(size, 1, 8, 8, generator=generator).to(dtype)
        yield x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 1).long()


def sets_of(net, kind="k-sparse", tau=15.0):
    return c.sets_for(net.named_parameters(), kind, tau=tau).sets


@pytest.mark.parametrize("step_length", ["detached", "differentiated"])
def test_scale_gradients_are_those_of_finite_differences(step_length):
    """float64, smooth net. Detached means: vertex and gamma held at their values while s moves, as stated."""
    net = network(torch.float64).eval()
    net[1].train()
    sets = sets_of(net, "lp")  # the L2 ball: its vertex moves smoothly, but counts as constant here
    fixed = {name: p.detach() for name, p in net.named_parameters()}
    names = [name for name, p in fixed.items() if p.any()]
    batch = next(batches(1, dtype=torch.float64))
    scales = torch.rand(len(names), generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    arguments = (net, fixed, names, sets)
    settings = (batch, 0.05, "gradient", step_length, nn.functional.cross_entropy)
    found = sfw_init._scale_gradient(*arguments, scales.clone().requires_grad_(), *settings)

    before, after = sfw_init._overlapping(batch)

    def parts(s):
        w = {name: (si * fixed[name]).requires_grad_() for name, si in zip(names, s, strict=True)}
        loss = sfw_init._loss(net, {**fixed, **w}, before, nn.functional.cross_entropy)
        g = dict(zip(names, torch.autograd.grad(loss, list(w.values())), strict=True))
        return {name: w[name].detach() for name in names}, g

    w0, g0 = parts(scales)
    vertices = {name: sets[name].lmo(g0[name]) for name in names}

    def gamma(w, g, name):
        return 0.05 * g[name].norm() / (w[name] - vertices[name]).norm()

    def loss_after(s):
        w, g = parts(s)
        gammas = {name: gamma(w, g, name) if step_length == "differentiated" else gamma(w0, g0, name) for name in names}
        moved = {name: (1 - gammas[name]) * w[name] + gammas[name] * vertices[name] for name in names}
        return sfw_init._loss(net, {**fixed, **moved}, after, nn.functional.cross_entropy).item()

    for i in range(len(names)):
        h = torch.zeros_like(scales)
        h[i] = 1e-6
        numeric = (loss_after(scales + h) - loss_after(scales - h)) / 2e-6
        assert found[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8), names[i]  # central differences: h^2 and 1e-16 / h


@pytest.mark.parametrize("kind", ["k-sparse", "k-support", "group-k-support", "nm", "lp"])
def test_it_ends_feasible_and_changes_scales_alone(kind):
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    net.train()
    net[4].eval()
    modes = [m.training for m in net.modules()]
    sets = sets_of(net, kind, tau=0.6)  # small: some tensors start outside
    scales = sfw_init_(net, sets, batches(6), kappa=0.05)
    for name, p in net.named_parameters():
        assert sets[name].gauge(p.detach()) <= 1 + 1e-6
        w = before[name]
        ratio = (p.detach() * w).sum() / (w * w).sum().clamp_min(1e-30)
        assert torch.allclose(p, ratio * w, rtol=1e-5, atol=1e-8), name  # still the old tensor times a number
        assert ratio <= scales[name] * (1 + 1e-5) and scales[name] >= 0
    assert scales["0.weight"] != 1 and scales["1.bias"] == 1  # a tensor of zeros has no scale
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert modes == [m.training for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("step_length", ["detached", "differentiated"])
def test_it_lowers_the_loss_after_one_step(step_length):
    """Weights far too large at the start: the scales learn to shrink them."""

    def one_step_loss(net, sets):
        x, y = next(batches(1, size=60))
        params = dict(net.named_parameters())
        names = list(params)
        scales = torch.ones(len(names), requires_grad=True)
        losses = []

        def recorded(output, target):
            losses.append(nn.functional.cross_entropy(output, target))
            return losses[-1]

        sfw_init._scale_gradient(
            net, {n: p.detach() for n, p in params.items()}, names, sets, scales, (x, y), 1.0, "gradient", "detached", recorded
        )
        return losses[-1].item()

    net = network().eval()
    with torch.no_grad():
        net[6].weight *= 30
    sets = sets_of(net)
    start = one_step_loss(net, sets)
    sfw_init_(net, sets, batches(40), kappa=0.05, step_length=step_length)
    assert one_step_loss(net, sets) < 0.5 * start


def test_scales_respect_their_least_value():
    net = network()
    with torch.no_grad():
        net[6].weight *= 100
    scales = sfw_init_(net, sets_of(net), batches(12), kappa=0.3, min_scale=0.2)
    assert min(s for name, s in scales.items() if not name.endswith("bias")) == pytest.approx(0.2)


def test_frozen_and_unconstrained_parameters_stay():
    net = network()
    net[0].weight.requires_grad_(False)
    sets = {**sets_of(net, tau=0.1), "6.weight": c.Unconstrained()}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    sfw_init_(net, sets, batches(2), kappa=0.1)
    assert torch.equal(net[0].weight, before["0.weight"]) and torch.equal(net[6].weight, before["6.weight"])
    assert not torch.equal(net[3].weight, before["3.weight"])


def test_it_is_deterministic():
    results = []
    for _ in range(2):
        net = network()
        results.append(sfw_init_(net, sets_of(net), batches(3)))
    assert results[0] == results[1]


def test_what_cannot_be_used_is_a_usage_error():
    net = network()
    with pytest.raises(UsageError, match="no parameter 'head'"):
        sfw_init_(net, {"head": c.KSparse(1, 1.0)}, batches(1))
    with pytest.raises(UsageError, match="at least 3"):
        sfw_init_(net, sets_of(net), batches(1, size=2))
