"""Budgets from curves: exact in density, least in error, monotone; and the choice of a layout."""

from itertools import product

import pytest
import torch

from gossamer.sparse.allocation import (
    Curves,
    EqualError,
    Fixed,
    Uniform,
    WaterFill,
    choose_layouts,
    coverage,
    give_out,
)
from gossamer.sparse.layout import BlockLayout, RowMajor, Tiles, TokenGrid
from gossamer.sparse.mask import BlockScores, keep_text
from gossamer.sparse.policies import Hybrid

RULES = [Uniform(), EqualError(measure="mass"), WaterFill(measure="velocity")]


def even(error):
    """Curves of heads whose N blocks hold the same share of the tokens, measured at each."""
    heads, num = error.shape
    counts = torch.arange(1, num + 1)
    return Curves((counts.double() / num).expand(heads, -1), counts, error)


def falling(heads, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(heads, num, generator=generator, dtype=torch.float64)
    error = error.sort(1, descending=True)[0]
    return torch.cat([error[:, :-1], torch.zeros(heads, 1, dtype=torch.float64)], 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("target", [1 / 16, 0.13, 0.3, 0.5, 0.9, 1.0])
def test_the_mean_density_is_the_target_within_half_a_block(rule, target):
    curves = even(falling(7, 16))
    counts, _ = give_out(rule.worth(curves), curves.density, target=target)
    assert counts.min() >= 1 and counts.max() <= 16
    assert counts.sum().item() / (16 * 7) == pytest.approx(target, abs=0.5 / (16 * 7) + 1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_larger_target_takes_no_block_away(rule):
    for seed in range(50):
        curves = even(falling(5, 12, seed))
        worth = rule.worth(curves)
        assert (worth.diff(dim=1) <= 0).all()
        last = torch.zeros(5)
        for target in (1 / 12, 0.2, 0.35, 0.5, 0.8, 1.0):
            counts, _ = give_out(worth, curves.density, target=target)
            assert (counts >= last).all()
            last = counts


def test_no_other_allocation_of_convex_curves_has_less_error():
    counts = torch.arange(1, 9, dtype=torch.float64) / 8
    curves = torch.stack([scale * (1 - counts) ** power for scale, power in ((1, 2), (3, 4))])
    known = even(curves)
    given, bound = give_out(WaterFill().worth(known), known.density, target=0.5)

    def error(pair):
        return sum(float(curves[h, n - 1]) for h, n in enumerate(pair))

    best = min((p for p in product(range(1, 9), repeat=2) if sum(p) == 8), key=error)
    assert error(given.tolist()) == pytest.approx(error(best))
    slopes = -curves.diff(dim=1) * 8  # every block worth more than the bound is given, and no other
    assert given.tolist() == [1 + int((s >= bound - 1e-12).sum()) for s in slopes]


def test_budgets_between_the_measured_densities_are_those_of_a_power_law():
    scale = torch.tensor([1.0, 4.0, 9.0, 2.25], dtype=torch.float64)
    density = (torch.arange(1, 101, dtype=torch.float64) / 100).expand(4, -1)
    points = torch.tensor([2, 5, 10, 20, 40])
    curves = Curves(density, points, scale[:, None] / (points / 100))  # error = scale / density
    counts, _ = give_out(WaterFill().worth(curves), density, target=0.15)
    best = 60 * scale.sqrt() / scale.sqrt().sum()  # where the slopes scale / density^2 are equal
    assert (counts - best).abs().max() <= 1 and not {*counts.tolist()} & {*points.tolist()}


def test_blocks_of_different_sizes_are_weighed_by_what_they_cost():
    # head 0 pays 0.5 for its second block, head 1 only 0.25, for the same gain
    density = torch.tensor([[0.25, 0.75, 1.0], [0.25, 0.5, 1.0]], dtype=torch.float64)
    error = torch.tensor([[1.0, 0.4, 0.0], [1.0, 0.4, 0.0]], dtype=torch.float64)
    curves = Curves(density, torch.arange(1, 4), error)
    counts, _ = give_out(WaterFill().worth(curves), density, target=0.375)
    assert counts.tolist() == [1, 2]


def test_equal_error_is_the_smallest_budget_of_each_head_below_the_bound():
    curves = even(falling(9, 20, seed=3))
    counts, bound = give_out(EqualError().worth(curves), curves.density, target=0.4)
    left = curves.error.gather(1, counts[:, None] - 1)[:, 0]
    before = curves.error.gather(1, (counts[:, None] - 2).clamp(min=0))[:, 0]
    assert (left <= bound + 1e-12).all()
    assert (before[counts > 1] >= bound - 1e-12).all()


def test_uniform_budgets_differ_by_at_most_one_block():
    curves = even(falling(6, 10))
    counts, _ = give_out(Uniform().worth(curves), curves.density, target=0.37)
    assert sorted(counts.tolist()) == [3, 3, 4, 4, 4, 4]


def test_a_noisy_curve_that_rises_is_no_obstacle():
    curves = even(torch.tensor([[1.0, 1.2, 0.3, 0.4, 0.0]], dtype=torch.float64))
    for rule in RULES:
        counts, _ = give_out(rule.worth(curves), curves.density, target=0.6)
        assert counts.tolist() == [3]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_heads_of_one_block_have_it_and_nothing_to_give_out(rule):
    density = torch.ones(3, 1, dtype=torch.float64)
    curves = Curves(density, torch.tensor([1]), 0 * density)
    counts, bound = give_out(rule.worth(curves), curves.density, target=1.0)
    assert counts.tolist() == [1, 1, 1] and bound == 0


def test_a_target_below_one_block_a_row_is_refused():
    curves = even(falling(3, 8))
    with pytest.raises(ValueError, match=r"sparsity=0.9: allowed is at most 0.8750 .*must stay"):
        give_out(Uniform().worth(curves), curves.density, target=0.1)


def test_an_unknown_measure_and_a_choice_without_a_budget_are_refused():
    with pytest.raises(ValueError, match=r"measure=loss: allowed is mass, relative_l1"):
        WaterFill(measure="loss")
    with pytest.raises(ValueError, match="allocation=fixed"):
        Fixed().worth(even(falling(1, 4)))


def own_blocks(sizes):
    """A layout whose heads have blocks of their own sizes [B, H, N]."""
    ends = torch.tensor(sizes).cumsum(-1)
    return BlockLayout(torch.nn.functional.pad(ends, (1, 0)).int(), block_size=8)


def layouts():
    ragged = Tiles(block=(2, 2, 4))
    yield ragged.build(TokenGrid(3, 5, 6))  # tiles cut at every border
    yield ragged.build(TokenGrid(3, 5, 6, text_before=5, text_after=18))
    yield RowMajor(q_block=8, kv_block=4).build(TokenGrid(3, 3, 3, text_after=3))
    clusters = own_blocks([[[3, 0, 5, 8], [4, 4, 4, 4]]] * 2)
    yield clusters, clusters


def test_blocks_that_the_estimator_forces_are_paid_for():
    layout = RowMajor(q_block=8, kv_block=4).build(TokenGrid(3, 3, 3))
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(1, 2, 4, 7, generator=generator).softmax(-1)
    scores = BlockScores(*layout, score, torch.rand(score.shape, generator=generator) < 0.3)
    covered, sizes = coverage(scores)[1], layout[0].sizes.double()
    for count in range(1, 8):
        density = Hybrid(k=count / 7)(scores).density
        torch.testing.assert_close((covered[..., count - 1] * sizes).sum(-1) / 27, density)


@pytest.mark.parametrize("pair", list(layouts()), ids=["ragged", "text", "row major", "clusters"])
def test_the_coverage_of_a_row_is_the_density_of_its_mask_in_token_pairs(pair):
    q_layout, kv_layout = pair
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, q_layout.num_blocks, kv_layout.num_blocks)
    scores = BlockScores(*pair, torch.rand(shape, generator=generator).softmax(-1))
    covered = coverage(scores)[1]
    sizes = q_layout.sizes.double().expand(shape[:3])
    for count in range(1, kv_layout.num_blocks + 1):
        mask = keep_text(Hybrid(k=count / kv_layout.num_blocks)(scores))
        planned = (covered[..., count - 1] * sizes).sum(-1) / sizes.sum(-1)
        torch.testing.assert_close(planned, mask.density, rtol=1e-12, atol=0)


def test_each_head_takes_the_cheapest_layout_that_is_close_enough():
    error = torch.tensor(
        [
            [1.0, 1.3, 1.19, 9.0],  # row-major
            [0.5, 1.1, 1.10, 9.0],  # tiles: as cheap
            [0.4, 1.0, 1.00, 1.0],  # clusters
        ]
    )
    cost = torch.tensor([0.0, 0.0, 0.12])
    assert choose_layouts(error, cost, reference=2).tolist() == [2, 1, 1, 2]
    assert choose_layouts(error, cost, reference=2, within=1.0).tolist() == [2, 2, 2, 2]
    assert choose_layouts(error, cost, reference=2, within=20.0).tolist() == [1, 1, 1, 0]
    dearer = torch.tensor([0.0, 0.05, 0.12])
    assert choose_layouts(error, dearer, reference=2).tolist() == [2, 1, 0, 2]


def test_a_layout_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="measure every candidate"):
        choose_layouts(torch.tensor([[1.0], [torch.nan]]), torch.zeros(2), reference=1)
