"""The N:M mask: both ways of working it out, against a stable sort of every group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.errors import UsageError
from prunectl.pruning import nm, sfw_stream
from prunectl.pruning.constraints import NM
from prunectl.pruning.sfw import SFW, frank_wolfe_step


def by_sorting(x, n, m):
    groups = x.abs().double().reshape(x.shape[0], -1, m, *x.shape[2:])
    rank = groups.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (rank < n).reshape(x.shape)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8),
    groups=st.integers(1, 3),
    out=st.integers(1, 4),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    levels=st.sampled_from([2, 5, 10**6]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_every_group_keeps_its_largest_ties_to_the_lowest_channel(m, groups, out, kernel, dtype, levels, seed, data):
    n = data.draw(st.integers(1, m))
    whole = torch.randint(-levels, levels + 1, (out, m * groups, *kernel), generator=torch.Generator().manual_seed(seed))
    x = (whole / levels).to(dtype)  # few levels: ties and zeros
    if len(kernel) == 2 and data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    expected = by_sorting(x, n, m)
    found = nm.nm_mask(x, n, m)
    assert torch.equal(found, expected) and found.stride() == x.stride()
    assert torch.equal(nm._mask_without_sync(x, n, m), expected)


@pytest.mark.parametrize("view", ["slice", "transposed"])
def test_views_with_gaps_and_other_orders(view):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x = x[:, ::2] if view == "slice" else torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(nm.nm_mask(x, 2, 4), by_sorting(x, 2, 4))


def test_tensors_larger_than_a_part():
    x = torch.randn(96, 500, 3, 3, generator=torch.Generator().manual_seed(1))  # 432,000 entries, and parts of other sizes
    assert x.numel() > 3 * nm._PART and torch.equal(nm.nm_mask(x, 2, 4), by_sorting(x, 2, 4))


def test_a_layer_without_groups_is_refused():
    with pytest.raises(UsageError, match=r"\(8, 6\) has no input channels in groups of 4"):
        nm.nm_mask(torch.ones(8, 6), 2, 4)
    with pytest.raises(UsageError, match="m = 128, expected at most 127"):
        nm.nm_mask(torch.ones(8, 256), 2, 128)


@pytest.mark.parametrize("kernel", ["none", "compiled"])
@pytest.mark.parametrize("shape", [(700, 800), (192, 320, 3, 3), (4, 16, 40, 41)], ids=["linear", "convolution", "long stride"])
def test_a_step_of_many_stretches_equals_the_plain_one(kernel, shape, monkeypatch):
    monkeypatch.setattr(sfw_stream, "CHUNK", 1 << 16)  # several parts, also where groups are long

    def noise(seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    p, m, constraint = torch.nn.Parameter(noise(0)), torch.zeros(shape, dtype=torch.float64), NM(2, 4, 900.0)
    w = p.detach().double()
    optimizer = SFW([p], constraint=constraint, lr=0.1, kernel=kernel)
    for t in range(4):
        p.grad = noise(t + 1)
        m = p.grad.double() if t == 0 else 0.9 * m + 0.1 * p.grad.double()
        m = m.float().double()  # ties and ranks as the optimizer's momentum has them
        w, _ = frank_wolfe_step(w, m, constraint, lr=0.1)
        optimizer.step()
    assert torch.allclose(p.detach().double(), w, rtol=1e-5, atol=1e-5)  # float32 against float64
