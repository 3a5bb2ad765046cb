"""One-shot pruning: exact counts, ties by index, only what is ranked is touched, drop lists that surgery takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunectl.errors import Unsatisfiable, UsageError
from prunectl.pruning import oneshot
from prunectl.pruning.channels import describe
from prunectl.pruning.surgery import analyse, compact
from tests.reference import sfw_oracle as oracle

RATIOS = [i / 10 for i in range(1, 10)] + [i / 100 for i in range(91, 100)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def rounded(net, step):
    """Weights on a coarse grid, so that nearly all magnitudes tie."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((p / step).round() * step)
    return net


@pytest.mark.parametrize("sparsity", [0.0, *RATIOS])
@pytest.mark.parametrize("ties", [False, True])
def test_global_pruning_zeroes_exactly_the_smallest(sparsity, ties):
    net = rounded(network(), 0.05) if ties else network()
    weights = oneshot.prunable(net)
    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    kept = len(flat) - round(sparsity * len(flat))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[torch.from_numpy(oracle.largest(flat.numpy(), kept))] = True
    masks = oneshot.prune_global_(net, sparsity)
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)
    assert torch.equal(torch.cat([w.detach().flatten() for w in weights.values()]), flat * expected)
    if not ties:
        assert oneshot.count_zeros(weights.values()) == round(sparsity * len(flat))


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_masks_of_higher_sparsity_are_nested_and_exact(sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randint(-3, 4, (7, 11), generator=generator).float(), "b": torch.randn(5, generator=generator)}
    for make, count in (
        (oneshot.global_masks, round(sparsity * 82)),
        (oneshot.layerwise_masks, round(sparsity * 77) + round(sparsity * 5)),
    ):
        lower, higher = make(weights, sparsity / 2), make(weights, sparsity)
        assert sum(int((~m).sum()) for m in higher.values()) == count
        assert all((lower[name] >= higher[name]).all() for name in weights)


def test_batch_norm_and_biases_are_ranked_only_on_request():
    net, all_of_it = network(), network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert list(oneshot.prunable(net)) == ["0.weight", "3.weight", "7.weight"]
    oneshot.prune_global_(net, 0.99)
    for name, p in net.named_parameters():
        if name not in ("0.weight", "3.weight", "7.weight"):
            assert torch.equal(p, before[name])
    oneshot.prune_global_(all_of_it, 0.9, scope="all")
    total = sum(p.numel() for p in all_of_it.parameters())
    assert oneshot.count_zeros(all_of_it.parameters()) == round(0.9 * total)
    assert oneshot.count_zeros([all_of_it[1].bias]) == 16  # zero from the start, so the first to go


def test_layerwise_pruning_is_exact_in_every_layer():
    net = network()
    oneshot.prune_layerwise_(net, 0.77)
    for w in oneshot.prunable(net).values():
        assert oneshot.count_zeros([w]) == round(0.77 * w.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_layouts(dtype):
    net = network().to(dtype).to(memory_format=torch.channels_last)
    oneshot.prune_global_(net, 0.5)
    weights = oneshot.prunable(net)
    assert oneshot.count_zeros(weights.values()) == round(0.5 * sum(w.numel() for w in weights.values()))
    assert all(w.dtype == dtype for w in weights.values()) and net[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_nm_masks_keep_the_largest_of_every_group_and_skip_misfits():
    net = network()
    masks = oneshot.prune_nm_(net, 2, 4)
    assert list(masks) == ["3.weight", "7.weight"]  # 3 input channels do not divide by 4
    for name, mask in masks.items():
        w = network().get_parameter(name).detach().double()
        assert torch.equal(mask, torch.from_numpy(oracle.nm(w.numpy(), 2, 4, 1.0) != 0)), name
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    assert oneshot.count_zeros([net[3].weight]) == net[3].weight.numel() // 2
    assert oneshot.count_zeros([net[0].weight]) == 0
    with pytest.raises(Unsatisfiable, match="divisible by 4"):
        oneshot.prune_nm_(network()[:3])


def residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.head((x + self.c(torch.relu(self.b(x)))).mean((2, 3)))

    torch.manual_seed(0)
    return Block().eval()


def test_zero_filters_are_listed_and_surgery_removes_them_unchanged_in_output():
    net = residual()
    with torch.no_grad():
        for layer, channels in ((net.a, [1, 5]), (net.c, [1, 2]), (net.b, [0, 3])):
            layer.weight[channels] = 0
            layer.bias[channels] = 0
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    views = describe(net, analyse(net, x[:1]))
    dropped = oneshot.small_filters({name: view.weights for name, view in views.items()}, share=0)
    assert dropped == {"b": [0, 3], "c": [1]}  # a and c are one group; 5 and 2 are zero on one side of the shortcut only
    small = compact(net, dropped, x[:1]).module
    assert small.a.out_channels == 7 and small.b.out_channels == 4
    assert torch.allclose(small(x), net(x), atol=1e-6)  # float32 sums of fewer terms


def test_small_filters_are_relative_to_the_layer_and_leave_one():
    weights = {"a": torch.tensor([[1.0, 0.0], [0.02, 0.0], [0.0, 0.5]]), "b": torch.zeros(3, 2), "c": 100 * torch.ones(2, 2)}
    assert oneshot.small_filters(weights, share=0.02 + 1e-9) == {"a": [1], "b": [1, 2]}
    assert oneshot.small_filters(weights, share=0.6) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2.0, float("nan")])
def test_impossible_sparsities_are_usage_errors(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        oneshot.prune_global_(network(), sparsity)
    with pytest.raises(UsageError, match="sparsity"):
        oneshot.prune_layerwise_(network(), sparsity)


def test_other_impossible_values_are_usage_errors():
    with pytest.raises(UsageError, match="5:4"):
        oneshot.prune_nm_(network(), 5, 4)
    with pytest.raises(UsageError, match="share"):
        oneshot.small_filters({"a": torch.ones(2, 2)}, share=1.0)
    with pytest.raises(UsageError, match="scope"):
        oneshot.prune_global_(network(), 0.5, scope="everything")


def test_a_tied_weight_is_ranked_once():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    net[1].weight = net[0].weight
    assert list(oneshot.prunable(net)) == ["0.weight", "2.weight"]
    oneshot.prune_global_(net, 0.5)
    assert oneshot.count_zeros(oneshot.prunable(net).values()) == (36 + 18) // 2
