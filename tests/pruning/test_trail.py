"""The trail of a search: every distance, in bounded memory, through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from pruning_nets import PRUNABLE, images, randomised

from prunectl.pruning.spline import activation_code, code_distance
from prunectl.pruning.trail import MAX_BYTES, MAX_CODES, Trail, thinned

NET = next(iter(PRUNABLE))


def moving_codes(n: int, count: int = 16) -> list:
    """Codes of a network that drifts away from where it began."""
    start, probe = randomised(PRUNABLE[NET]()).state_dict(), images(count)
    there, model, codes = randomised(PRUNABLE[NET](), seed=1).state_dict(), PRUNABLE[NET]().double(), []
    for i in range(n):
        model.load_state_dict({k: torch.lerp(v, there[k], i / n) if v.is_floating_point() else v for k, v in start.items()})
        codes.append(activation_code(model, probe))
    return codes


def test_the_matrix_holds_the_distance_of_every_pair() -> None:
    codes, trail = moving_codes(4), Trail()
    for i, code in enumerate(codes):
        trail.add(i / 4, code)
    matrix = trail.matrix()
    assert trail.epochs == [0, 0.25, 0.5, 0.75]
    assert matrix == [[code_distance(a, b) for b in codes] for a in codes]
    assert matrix[0][1] < matrix[0][3], "the network drifts, so the last is farther from the first than the second"


def test_a_long_search_keeps_evenly_spaced_probes_within_its_memory() -> None:
    code, trail = moving_codes(1)[0], Trail()
    for i in range(1, 5 * MAX_CODES + 1):
        trail.add(float(i), code)
    assert MAX_CODES / 2 <= len(trail.codes) <= MAX_CODES
    gaps = {b - a for a, b in zip(trail.epochs, trail.epochs[1:], strict=False)}
    assert len(gaps) == 1 and trail.epochs[-1] > 5 * MAX_CODES - gaps.pop()


@pytest.mark.parametrize("cut", [0, 3, MAX_CODES + 10])
def test_a_restored_trail_goes_on_as_if_never_interrupted(cut: int) -> None:
    codes, whole, first, second = moving_codes(5), Trail(), Trail(), Trail()
    for i in range(cut + 5):
        if i == cut:
            second.restore(first.state())
        whole.add(i, codes[i % 5])
        (first if i < cut else second).add(i, codes[i % 5])
    assert second.epochs == whole.epochs and second.matrix() == whole.matrix()


def test_a_thin_code_is_near_the_whole_one() -> None:
    """The share of a quarter of a layer's bytes: within four standard errors of bits that come eight at a time."""
    a, b = moving_codes(2, count=64)
    part = a.nbytes // 4
    thin_a, thin_b = thinned(a, part), thinned(b, part)
    assert thin_a.nbytes <= max(part, 8 * 64 * len(a.layers)) < a.nbytes <= MAX_BYTES
    bits = min(c.units for c in thin_a.layers) * 64
    assert abs(code_distance(thin_a, thin_b) - code_distance(a, b)) < 4 * (8 / (4 * bits)) ** 0.5
    assert thinned(a, a.nbytes) is a
