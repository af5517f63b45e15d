from itertools import product

import pytest
import torch

from gossamer.sparse.allocation import water_fill

DENSITY = torch.tensor([0.125, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)


def test_the_mean_share_is_the_target():
    error = torch.rand(7, 5, dtype=torch.float64).sort(1, descending=True)[0]
    for target in (0.125, 0.3, 0.5, 0.9):
        share = water_fill(DENSITY, error, target=target, num_blocks=16)
        assert share.mean().item() == pytest.approx(target, abs=0.5 / (16 * 7) + 1e-12)


def test_no_other_allocation_of_convex_curves_has_less_error():
    counts = torch.arange(1, 9, dtype=torch.float64) / 8
    curves = torch.stack([scale * (1 - counts) ** power for scale, power in ((1, 2), (3, 4))])
    share = water_fill(counts, curves, target=0.5, num_blocks=8)

    def error(pair):
        return sum(float(curves[h, n - 1]) for h, n in enumerate(pair))

    best = min((p for p in product(range(1, 9), repeat=2) if sum(p) == 8), key=error)
    assert error((share * 8).round().int().tolist()) == pytest.approx(error(best))


def test_a_head_with_more_to_lose_gets_more():
    error = torch.stack([(1 - DENSITY), 5 * (1 - DENSITY) ** 3])
    share = water_fill(DENSITY, error, target=0.4, num_blocks=8)
    assert share[1] > share[0] >= 1 / 8


def test_a_noisy_curve_that_rises_is_no_obstacle():
    error = torch.tensor([[1.0, 1.2, 0.3, 0.4, 0.0]], dtype=torch.float64)
    assert water_fill(DENSITY, error, target=0.5, num_blocks=8).item() == pytest.approx(0.5)
