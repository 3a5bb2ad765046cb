"""The Frank-Wolfe optimizer: equal to the oracle, feasible for ever, exact where it must be, and a good torch citizen."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from prunectl.errors import UsageError
from prunectl.pruning import constraints as c
from prunectl.pruning import nm, sfw_kernel, sfw_schedule, topk
from prunectl.pruning.sfw import SFW, frank_wolfe_gap, frank_wolfe_step
from tests.reference import sfw_oracle as oracle

SHAPE = (16, 8, 3, 3)
SETS = {
    "k-sparse": (c.KSparse(58, 0.4), lambda m: oracle.k_sparse(m, 58, 0.4)),
    "k-support": (c.KSupport(58, 3.0), lambda m: oracle.k_support(m, 58, 3.0)),
    "group-k-support": (c.GroupKSupport(4, 3.0), lambda m: oracle.group_k_support(m, 4, 3.0)),
    "nm": (c.NM(2, 4, 3.0), lambda m: oracle.nm(m, 2, 4, 3.0)),
    "lp": (c.LpBall(1.5, 3.0), lambda m: oracle.lp(m, 1.5, 3.0)),
    "lp-2": (c.LpBall(2.0, 3.0), lambda m: oracle.lp(m, 2.0, 3.0)),
}
each_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture(params=["cpu", "compiled", "without_sync"])
def route(request, monkeypatch):
    """The three ways a step is carried out; the one for GPUs runs here on CPU tensors."""
    if request.param == "without_sync":
        use_route_without_sync(monkeypatch)
    return request.param


def use_route_without_sync(monkeypatch):
    def top_k(x, k, *, memory=None):
        return x.clone() if k >= x.numel() else topk._top_k_without_sync(x, k)

    monkeypatch.setattr(c, "top_k", top_k)
    monkeypatch.setattr(c, "nm_mask", nm._mask_without_sync)
    monkeypatch.setattr(SFW, "_reads_back", False)


def kernel_of(route):
    return "compiled" if route == "compiled" else "none"


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- oracle ----------------------------------------------------------------------------------------------------------


@each_set
@pytest.mark.parametrize("rescale", ["gradient", "diameter", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["row-major", "channels-last"])
def test_thirty_steps_equal_the_oracle_in_float64(name, rescale, layout, route):
    constraint, vertex = SETS[name]
    start = [constraint.shrink(random(*SHAPE, seed=i)) for i in range(3)]
    params = [nn.Parameter(w.clone(memory_format=layout)) for w in start]
    frozen = nn.Parameter(random(*SHAPE, seed=9), requires_grad=False)
    group = [params[0], frozen, *params[1:]]  # a tensor without gradient in the middle must not shift the others
    lr = 0.05 if rescale == "gradient" else 0.01
    optimizer = SFW([{"params": group, "constraint": constraint}], lr=lr, momentum=0.9, rescale=rescale, kernel=kernel_of(route))
    expected = [(w.numpy(), None) for w in start]
    diameter = constraint.diameter(torch.Size(SHAPE))
    for t in range(30):
        for i, p in enumerate(params):
            p.grad = random(*SHAPE, seed=100 * t + i).contiguous(memory_format=layout) + 0.3 * p.detach()
            if (t, i) == (7, 1):
                p.grad.zero_()
            w, m = expected[i]
            g = p.grad.numpy().copy()
            expected[i] = oracle.step(w, m, g, vertex, lr=lr, momentum=0.9, rescale=rescale, diameter=diameter)
        optimizer.step()
    for p, (w, _) in zip(params, expected, strict=True):
        assert np.abs(p.detach().numpy() - w).max() < 1e-6
        assert p.is_contiguous(memory_format=layout)
    assert torch.equal(frozen, random(*SHAPE, seed=9))


@pytest.mark.parametrize("name", ["k-sparse", "k-support"])
@pytest.mark.parametrize("size", [3000, 70_000])
def test_float32_steps_equal_the_oracle_step_by_step(name, size, route):
    """Compared from the same state each step: only entries within 4 ulp of the threshold may fall on the other side."""
    k, radius = size // 20, 0.4
    constraint = {"k-sparse": c.KSparse(k, radius), "k-support": c.KSupport(k, radius)}[name]
    vertex = {"k-sparse": lambda m: oracle.k_sparse(m, k, radius), "k-support": lambda m: oracle.k_support(m, k, radius)}[name]
    p = nn.Parameter(constraint.shrink(random(size, seed=0, dtype=torch.float32)))
    optimizer = SFW([{"params": [p], "constraint": constraint}], lr=0.02, kernel=kernel_of(route))
    w, m = p.detach().double().numpy(), None
    for t in range(30):
        p.grad = random(size, seed=t + 1, dtype=torch.float32)
        w, m = oracle.step(w, m, p.grad.double().numpy(), vertex, lr=0.02, momentum=0.9, rescale="gradient", diameter=1.0)
        optimizer.step()
        found = optimizer.state[p]["momentum_buffer"]
        assert np.abs(found.numpy() - m).max() < 1e-6 * np.abs(m).max()
        magnitude = np.abs(m)
        threshold = np.sort(magnitude)[-k]
        clear = np.abs(magnitude - threshold) > 4 * np.spacing(np.float32(threshold))
        # gamma of a few 1e-2 times 1e-6 relative error of the sums, and float32's own rounding of w
        assert np.abs(p.detach().numpy() - w)[clear].max() < 1e-6 * max(1.0, np.abs(w).max())
        w, m = p.detach().double().numpy(), found.double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_support_is_exact(dtype, route):
    """Half the entries of a bfloat16 tensor tie; the support is still that of the oracle on the same m."""
    k = 1000
    p = nn.Parameter(torch.zeros(20_000, dtype=dtype))
    optimizer = SFW([{"params": [p], "constraint": c.KSparse(k, 1.0)}], lr=1.0, rescale="none", kernel=kernel_of(route))
    for t in range(3):
        p.grad = random(20_000, seed=t, dtype=dtype)
        optimizer.step()
        m = optimizer.state[p]["momentum_buffer"].float().numpy()
        support = np.flatnonzero(p.detach().float().numpy())  # lr 1 without rescaling lands on the vertex
        assert np.array_equal(support, np.sort(oracle.largest(m, k)))


def test_the_three_routes_agree_on_many_tensors_of_few_shapes(monkeypatch):
    shapes = [(64,)] * 5 + [(70_000,)] * 2 + [(16, 8, 3, 3)] * 3 + [(1,), (10, 64)]
    results = {}
    for way in ("cpu", "compiled", "without_sync"):
        with monkeypatch.context() as patch:
            if way == "without_sync":
                use_route_without_sync(patch)
            params = [nn.Parameter(random(*shape, seed=i, dtype=torch.float32)) for i, shape in enumerate(shapes)]
            groups = [{"params": [p], "constraint": c.KSparse(max(1, p.numel() // 10), 0.1 + i)} for i, p in enumerate(params)]
            optimizer = SFW(groups, lr=0.1, kernel=kernel_of(way))
            optimizer.feasible_()
            for t in range(5):
                for i, p in enumerate(params):
                    p.grad = random(*p.shape, seed=50 * t + i, dtype=torch.float32)
                optimizer.step()
            results[way] = [p.detach() for p in params], int(optimizer.statistics().clamped)
    for way in ("compiled", "without_sync"):
        for a, b in zip(results["cpu"][0], results[way][0], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order
        assert results[way][1] == results["cpu"][1]


def test_kernel_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            params = [nn.Parameter(random(n, seed=n, dtype=torch.float32)) for n in (5, 100, 70_000, 30_000)]
            optimizer = SFW(params, constraint=c.KSupport(10, 1.0), lr=0.1, kernel="compiled")
            for t in range(4):
                for p in params:
                    p.grad = random(p.numel(), seed=t, dtype=torch.float32)
                optimizer.step()
            results.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kernel_breaks_ties_by_index_and_takes_zeros():
    p = nn.Parameter(torch.zeros(5000))
    optimizer = SFW([p], constraint=c.KSparse(700, 1.0), lr=1.0, rescale="none", kernel="compiled")
    for seed, zeros in ((0, 0.0), (1, 0.95), (2, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        p.grad = torch.randint(-3, 4, (5000,), generator=generator) * (torch.rand(5000, generator=generator) >= zeros).float()
        optimizer.step()
        m = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(p.detach(), c.KSparse(700, 1.0).lmo(m))


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    sfw_kernel.library.cache_clear()
    try:
        with pytest.raises(UsageError, match="no-such-compiler"):
            SFW([nn.Parameter(torch.ones(3))], constraint=c.KSparse(1, 1.0), kernel="compiled")
    finally:
        monkeypatch.undo()
        sfw_kernel.library.cache_clear()


# --- properties ------------------------------------------------------------------------------------------------------


@each_set
def test_an_unclamped_step_has_length_lr_times_momentum(name):
    constraint, _ = SETS[name]
    w = constraint.shrink(0.1 * random(*SHAPE, seed=0))
    for seed in range(20):
        m = random(*SHAPE, seed=seed + 1)
        moved, gamma = frank_wolfe_step(w, m, constraint, lr=1e-3)
        assert 0 < gamma < 1
        assert (moved - w).norm().item() == pytest.approx(1e-3 * m.norm().item(), rel=1e-9)  # w - w_new loses 1e-16 / 1e-3 / length
        w = moved


@each_set
def test_a_thousand_steps_stay_in_the_set(name, route):
    constraint, _ = SETS[name]
    p = nn.Parameter(random(*SHAPE, seed=0, dtype=torch.float32))
    optimizer = SFW([p], constraint=constraint, lr=0.05, kernel=kernel_of(route))
    optimizer.feasible_()
    generator = torch.Generator().manual_seed(1)
    pull = random(*SHAPE, seed=2, dtype=torch.float32)  # a lasting direction drives the weights to the boundary
    for t in range(1000):
        p.grad = pull + torch.randn(SHAPE, generator=generator)
        optimizer.step()
        if t % 50 == 49:
            assert constraint.gauge(p.detach()) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["k-sparse", "k-support"])
def test_a_full_step_lands_on_a_vertex_of_exactly_k_entries(name, route):
    constraint, _ = SETS[name]
    p = nn.Parameter(torch.zeros(SHAPE))
    optimizer = SFW([p], constraint=constraint, lr=1.0, rescale="none", kernel=kernel_of(route))
    p.grad = (random(*SHAPE, seed=3) * 2).round().add(10).float()  # nothing is zero, nearly everything ties
    optimizer.step()
    assert p.count_nonzero() == 58
    assert optimizer.statistics().active_fraction == pytest.approx(58 / p.numel())


@each_set
def test_the_gap_is_never_negative_and_zero_at_the_vertex(name):
    constraint, _ = SETS[name]
    m = random(*SHAPE, seed=4)
    for seed in range(20):
        assert frank_wolfe_gap(constraint.shrink(random(*SHAPE, seed=seed)), m, constraint) >= 0
    assert abs(frank_wolfe_gap(constraint.lmo(m), m, constraint)) < 1e-12


def test_frank_wolfe_converges_on_a_convex_problem(route):
    """min |w - target|^2 / 2 over the K-sparse polytope, target outside: the best gap falls like 1 / t."""
    constraint = c.KSparse(5, 0.5)
    target = random(40, seed=5)
    p = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = SFW([p], constraint=constraint, momentum=0.0, lr=1.0, rescale="none", kernel=kernel_of(route))
    gaps = []
    for t in range(1000):
        optimizer.param_groups[0]["lr"] = 2 / (t + 2)
        p.grad = p.detach() - target
        gaps.append(frank_wolfe_gap(p.detach(), p.grad, constraint).item())
        optimizer.step()
    assert min(gaps) <= 27 / 4 * constraint.diameter(p.shape) ** 2 / 1002  # Jaggi 2013, Theorem 2, curvature D^2


# --- gradients that are not ordinary ----------------------------------------------------------------------------------


@each_set
@pytest.mark.parametrize("rescale", ["gradient", "diameter", "none"])
def test_zero_gradients_leave_weights_bit_identical(name, rescale, route):
    p = nn.Parameter(random(*SHAPE, seed=6, dtype=torch.float32))
    optimizer = SFW([p], constraint=SETS[name][0], lr=0.5, rescale=rescale, kernel=kernel_of(route))
    optimizer.feasible_()
    before = p.detach().clone()
    for _ in range(3):
        p.grad = torch.zeros(SHAPE)
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_non_finite_gradient_skips_the_whole_step_and_is_counted(bad, first, route):
    params, twins = ([nn.Parameter(random(300, seed=i, dtype=torch.float32)) for i in range(2)] for _ in range(2))
    optimizer, reference = (SFW(ps, constraint=c.KSparse(20, 0.5), lr=0.1, kernel=kernel_of(route)) for ps in (params, twins))
    for t in range(4):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = random(300, seed=10 * t + i, dtype=torch.float32)
            q.grad = p.grad.clone()
        if t == (0 if first else 2):
            params[1].grad[7] = bad
        else:
            reference.step()
        optimizer.step()
    assert optimizer.statistics().screened == 1 and reference.statistics().screened == 0
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_huge_finite_gradients_are_not_taken_for_infinite():
    p = nn.Parameter(torch.zeros(4000))
    optimizer = SFW([p], constraint=c.KSparse(20, 0.5), lr=1.0, rescale="none")
    p.grad = torch.full((4000,), 3e38)  # their sum overflows
    optimizer.step()
    assert p.count_nonzero() == 20 and optimizer.statistics().screened == 0


def test_sparse_gradients_are_refused():
    """Before any tensor has moved."""
    embedding, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(4))
    optimizer = SFW([other, *embedding.parameters()], constraint=c.KSparse(2, 1.0))
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(4)
    with pytest.raises(UsageError, match="sparse"):
        optimizer.step()
    assert torch.equal(other, torch.ones(4))


# --- a torch optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_without_a_constraint_it_is_torch_sgd(weight_decay, route):
    """m = g, then rho m + (1 - rho) g, is torch's buffer with dampening rho (its first gradient is not dampened)."""
    ours, theirs = ([nn.Parameter(random(500, seed=i)) for i in range(3)] for _ in range(2))
    a = SFW(ours, constraint=c.Unconstrained(), lr=0.3, momentum=0.9, weight_decay=weight_decay)
    b = torch.optim.SGD(theirs, lr=0.3, momentum=0.9, dampening=0.9, weight_decay=weight_decay)
    for t in range(50):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = random(500, seed=10 * t + i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-13, atol=1e-14)  # lerp and mul-add round differently


@pytest.mark.parametrize("kernel", ["none", "compiled"])
def test_a_checkpoint_continues_bit_for_bit(kernel):
    def make(params):
        sets = [c.KSparse(100, 0.5), c.KSupport(50, 2.0), c.LpBall(2.0, 1.0), c.Unconstrained()]
        groups = [{"params": [p], "constraint": s} for p, s in zip(params, sets, strict=True)]
        optimizer = SFW(groups, lr=0.2, kernel=kernel)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def advance(params, optimizer, scheduler, steps):
        for t in steps:
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=20 * t + i, dtype=torch.float32)
            if t == 3:
                params[0].grad[0, 0] = math.nan
            optimizer.step()
            scheduler.step()

    params = [nn.Parameter(random(300, 100, seed=i, dtype=torch.float32)) for i in range(4)]
    optimizer, scheduler = make(params)
    advance(params, optimizer, scheduler, range(6))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "params": params}, file)
    advance(params, optimizer, scheduler, range(6, 12))

    file.seek(0)
    loaded = torch.load(file, weights_only=True)  # refuses pickled objects
    resumed = [nn.Parameter(p.detach()) for p in loaded["params"]]
    other, other_scheduler = make(resumed)
    other.load_state_dict(loaded["optimizer"])
    other_scheduler.load_state_dict(loaded["scheduler"])
    assert [g["constraint"] for g in other.param_groups] == [g["constraint"] for g in optimizer.param_groups]
    advance(resumed, other, other_scheduler, range(6, 12))
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    ours, theirs = vars(optimizer.statistics()), vars(other.statistics())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours["screened"] == 1


def test_a_loaded_state_shares_no_memory_with_its_source():
    a, b = (nn.Parameter(torch.zeros(50)) for _ in range(2))
    first, second = (SFW([p], constraint=c.KSparse(5, 1.0)) for p in (a, b))
    a.grad = b.grad = torch.ones(50)
    first.step()
    second.load_state_dict(first.state_dict())
    before = first.state[a]["momentum_buffer"].clone()
    b.grad = torch.full((50,), -9.0)
    second.step()
    assert torch.equal(first.state[a]["momentum_buffer"], before)


def test_a_deep_copy_of_the_optimizer_steps_on():
    p = nn.Parameter(torch.zeros(50))
    optimizer = copy.deepcopy(SFW([p], constraint=c.KSparse(5, 1.0)))
    q = optimizer.param_groups[0]["params"][0]
    q.grad = torch.ones(50)
    optimizer.step()
    assert q.count_nonzero() == 5


def test_momentum_follows_a_change_of_memory_format(route):
    constraint, vertex = SETS["k-sparse"]
    p = nn.Parameter(random(*SHAPE, seed=0))
    optimizer = SFW([p], constraint=constraint, lr=0.05, kernel=kernel_of(route))
    optimizer.feasible_()
    w, m = p.detach().numpy().copy(), None
    for t in range(6):
        if t == 3:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        p.grad = random(*SHAPE, seed=t)
        w, m = oracle.step(w, m, p.grad.numpy(), vertex, lr=0.05, momentum=0.9, rescale="gradient", diameter=1.0)
        optimizer.step()
    assert np.abs(p.detach().numpy() - w).max() < 1e-6


def test_outside_edits_of_the_weights_are_seen_at_once():
    constraint, vertex = SETS["k-sparse"]
    p = nn.Parameter(constraint.shrink(random(*SHAPE, seed=0)))
    optimizer = SFW([p], constraint=constraint, lr=0.05)
    w, m = p.detach().numpy().copy(), None
    for t in range(4):
        if t == 2:
            p.data *= 0.25
            w = 0.25 * w
        p.grad = random(*SHAPE, seed=t)
        w, m = oracle.step(w, m, p.grad.numpy(), vertex, lr=0.05, momentum=0.9, rescale="gradient", diameter=1.0)
        optimizer.step()
    assert np.abs(p.detach().numpy() - w).max() < 1e-6


def test_trains_a_small_network_with_closure_and_set_to_none():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    sets = c.sets_for(model.named_parameters(), "k-sparse", tau=15, k_fraction=0.1).sets
    optimizer = SFW([{"params": [p], "constraint": sets[name]} for name, p in model.named_parameters()], lr=1.0)
    optimizer.feasible_()

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < 0.2 * losses[0]
    assert optimizer.statistics().gap >= 0
    optimizer.zero_grad(set_to_none=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()  # nothing has a gradient
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_nothing_is_read_back_without_sync():
    """Meta tensors hold no data, so any `.item()`, branch on a value or data-dependent shape would raise."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((64,), (64,), (64, 64, 3, 3), (10, 64))]
    sets = [c.KSparse(5, 1.0), c.KSparse(5, 2.0), c.NM(2, 4, 1.0), c.GroupKSupport(3, 1.0)]
    optimizer = SFW([{"params": [p], "constraint": s} for p, s in zip(params, sets, strict=True)])
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert optimizer.statistics().gap.device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": math.nan}, "lr"),
        ({"lr": 1.5, "rescale": "none"}, "past the vertex"),
        ({"rescale": "grad"}, "gradient, diameter, none"),
        ({"kernel": "cuda"}, "none, compiled"),
        ({"weight_decay": 1e-4}, "weight_decay"),
        ({"weight_decay": math.nan, "constraint": c.Unconstrained()}, "weight_decay = nan"),
        ({"lr": "1"}, "lr = '1'"),
        ({"constraint": None}, "no constraint"),
        ({"constraint": "k-sparse"}, "expected a set"),
    ],
)
def test_bad_settings_are_usage_errors(settings, message):
    with pytest.raises(UsageError, match=message):
        SFW([nn.Parameter(torch.ones(4))], **{"constraint": c.KSparse(2, 1.0), **settings})


def test_a_refused_group_is_not_kept_and_empty_ones_do_no_harm():
    p, nothing = nn.Parameter(torch.ones(4)), nn.Parameter(torch.empty(0, 3))
    optimizer = SFW([{"params": []}, {"params": [p, nothing]}], constraint=c.KSparse(2, 1.0))
    for refused in (
        {"params": [nn.Parameter(torch.ones(2))], "constraint": None},
        {"params": [nn.Parameter(torch.ones(2, dtype=torch.cfloat))]},
    ):
        with pytest.raises(UsageError):
            optimizer.add_param_group(refused)
    assert len(optimizer.param_groups) == 2
    p.grad, nothing.grad = torch.ones(4), torch.empty(0, 3)
    optimizer.feasible_()
    optimizer.step()
    assert optimizer.statistics().active_fraction == 0.5
    with pytest.raises(UsageError, match="another optimizer's"):
        optimizer.load_state_dict(torch.optim.SGD([p], lr=0.1).state_dict())


def test_sets_take_the_numbers_of_other_libraries_and_keep_plain_ones():
    kept = c.KSparse(np.int64(3), torch.tensor(0.5)).to_dict()
    assert kept == {"kind": "k-sparse", "k": 3, "radius": 0.5} and type(kept["k"]) is int and type(kept["radius"]) is float
    with pytest.raises(UsageError, match="radius = 'a', expected a number"):
        c.KSparse(1, "a")


def test_a_scheduler_that_leaves_the_range_is_stopped_at_the_step():
    p = nn.Parameter(torch.ones(4))
    optimizer = SFW([p], constraint=c.KSparse(2, 1.0), lr=1.0, rescale="none")
    optimizer.param_groups[0]["lr"] = 1.06
    p.grad = torch.ones(4)
    with pytest.raises(UsageError, match="past the vertex"):
        optimizer.step()


def test_a_strided_slice_is_refused():
    with pytest.raises(UsageError, match="slice"):
        SFW([nn.Parameter(torch.ones(4, 6)[:, ::2])], constraint=c.KSparse(2, 1.0))


# --- learning rates ----------------------------------------------------------------------------------------------------


def test_the_adaptive_rule_looks_every_five_epochs_at_true_means():
    falling, rising = [1 / (i + 1) for i in range(60)], [1 + i for i in range(60)]
    assert [len(falling[:n]) for n in range(60) if sfw_schedule.adaptive_factor(falling[:n]) != 1] == list(range(25, 60, 5))
    assert sfw_schedule.adaptive_factor(falling[:25]) == 1.06
    assert sfw_schedule.adaptive_factor(rising[:30]) == 0.7
    assert sfw_schedule.adaptive_factor([2.0] * 24 + [3.0]) == 0.7  # the newest epoch counts
    assert sfw_schedule.adaptive_factor([1.0] * 25) == 1.0
    assert sfw_schedule.adaptive_scale(falling[:31], 180) == pytest.approx(1.06**2)
    assert sfw_schedule.adaptive_scale(falling[:31], 59) == 1.0  # too short for the rule


EXTREME = {"nm": c.NM(2, 4, 1.0), "lp": c.LpBall(2.0, 1.0), "k-support": c.KSupport(7, 1.0), "k-sparse": c.KSparse(7, 1.0)}


@pytest.mark.parametrize("kernel", ["none", "compiled"])
@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("size", [1e-25, 1e-21, 1e20, 1e30])
def test_gradients_whose_squares_leave_the_range_of_float32(name, size, kernel):
    p = nn.Parameter(0.02 * random(8, 8, seed=0, dtype=torch.float32))
    optimizer = SFW([p], constraint=EXTREME[name], lr=0.3, rescale="diameter", kernel=kernel)
    w = p.detach().double()
    p.grad = (random(8, 8, seed=1) * size).float()
    w, _ = frank_wolfe_step(w, p.grad.double(), EXTREME[name], lr=0.3, rescale="diameter")
    optimizer.step()
    assert torch.allclose(p.detach().double(), w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", ["none", "compiled"])
@pytest.mark.parametrize("name", EXTREME)
def test_a_constant_direction_leads_all_the_way_to_its_vertex(name, kernel):
    p = nn.Parameter(0.02 * random(8, 8, seed=0, dtype=torch.float32))
    optimizer = SFW([p], constraint=EXTREME[name], lr=0.5, rescale="none", kernel=kernel)
    p.grad = random(8, 8, seed=1, dtype=torch.float32)
    for _ in range(60):
        optimizer.step()
    vertex = EXTREME[name].lmo(p.grad.double())
    assert float((p.detach().double() - vertex).norm() / vertex.norm()) < 1e-6  # float32's eps is 1.2e-7
    assert int(optimizer.statistics().clamped) == 0


@pytest.mark.parametrize("kernel", ["none", "compiled"])
def test_a_tensor_without_groups_of_channels_is_refused(kernel):
    for shape in ((8, 6), (8,), (2, 1, 3, 3)):
        with pytest.raises(UsageError, match="no input channels in groups of 4"):
            SFW([nn.Parameter(torch.ones(shape))], constraint=c.NM(2, 4, 1.0), kernel=kernel)


@pytest.mark.parametrize("kernel", ["none", "compiled"])
def test_ties_do_not_shorten_the_vertex(kernel):
    """A million equal magnitudes, of which ten are kept: the step without rescaling and with rate 1 ends at the vertex."""
    p = nn.Parameter(torch.zeros(1 << 20))
    optimizer = SFW([{"params": [p], "constraint": c.KSupport(10, 1.0)}], lr=1.0, momentum=0.0, rescale="none", kernel=kernel)
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    assert p.detach().double().norm().item() == pytest.approx(1, rel=1e-6) and p.count_nonzero() == 10
