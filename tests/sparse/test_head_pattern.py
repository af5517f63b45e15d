from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.estimators.head_pattern import HeadPattern as Estimator
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.layouts.head_pattern import (
    NEITHER,
    SPATIAL,
    TEMPORAL,
    HeadPattern,
    band_width,
    sampled_rows,
)
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(8, 4, 6)
GRIDS = [
    GRID,
    TokenGrid(1, 4, 4),
    TokenGrid(7, 1, 1),
    TokenGrid(1, 1, 1),
    TokenGrid(3, 2, 5, text_before=3, text_after=9),
]


def qkv(grid, seed=0, heads=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, grid.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def heads_of(grid, *axes, sharpness=6.0):
    """q, k, v with one head for each axis: it attends to tokens of nearly the same coordinate."""
    token = torch.arange(grid.num_video)
    positions = grid.height * grid.width
    coordinates = {
        "frame": token // positions / grid.frames,
        "position": token % positions / positions,
    }
    generator = torch.Generator().manual_seed(0)
    q, v = (
        torch.zeros(1, len(axes), len(token), 2),
        torch.randn(1, len(axes), len(token), 2, generator=generator),
    )
    for head, axis in enumerate(axes):
        if axis is not None:
            angle = 3 * coordinates[axis]
            q[0, head] = sharpness * torch.stack([angle.cos(), angle.sin()], -1)
    return q, q, v


def method(layout, k=0.3):
    return SparseMethod(layout, Estimator(), Hybrid(k=k), Drop())


def small(**arguments):
    return HeadPattern(q_block=16, kv_block=8, **arguments)


def test_spatial_temporal_and_other_heads_are_told_apart():
    q, k, v = heads_of(GRID, "frame", "position", None, "position")
    found = small(max_error=0.5, sink_frames=0).classify(q, k, v, GRID)
    assert found.tolist() == [[SPATIAL, TEMPORAL, NEITHER, TEMPORAL]]
    better = small(sink_frames=0).classify(q, k, v, GRID)
    assert (better != NEITHER).all() and better[0, :2].tolist() == [SPATIAL, TEMPORAL]


def test_the_error_is_that_of_masked_attention_on_the_sampled_rows():
    q, k, v = qkv(grid := TokenGrid(4, 2, 3, text_before=2, text_after=3))
    layout = small(rows=7, density=0.3, sink_frames=1)
    width = band_width(0.3, 24)
    error = torch.zeros(2, 3, 2, dtype=torch.float64)
    for pattern in range(2):
        visible = torch.ones(7, 29, dtype=torch.bool)
        for i, row in enumerate(sampled_rows(24, 7).tolist()):
            for key in range(6, 24):
                place = [(t, t % 6 * 4 + t // 6)[pattern] for t in (row, key)]
                visible[i, key + 2] = abs(place[0] - place[1]) <= width
        rows = q[:, :, sampled_rows(24, 7) + 2]
        dense = F.scaled_dot_product_attention(rows, k, v)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible)
        error[..., pattern] = (out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
    found = layout.errors(q, k, v, grid)
    torch.testing.assert_close(found.double(), error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [TokenGrid(8, 6, 9), TokenGrid(3, 7, 11, text_after=2)])
def test_half_precision_has_the_errors_of_its_numbers_and_the_same_patterns(grid, dtype):
    """And 233 tokens, a prime, have a single part."""
    q, k, v = heads_of(TokenGrid(grid.frames, grid.height, grid.width), "frame", "position")
    pad = (0, 0, 0, grid.text_after)
    random = qkv(grid, heads=6)
    q, k, v = (
        torch.cat([F.pad(x, (*(0, 14), *pad[2:])), y[:1].float()], 1).to(dtype)
        for x, y in zip((q, k, v), random, strict=True)
    )
    layout = small(density=0.3)
    exact = layout.errors(q.double(), k.double(), v.double(), grid)
    found = layout.errors(q, k, v, grid)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=1e-4)
    clear = (exact[..., 0] / exact[..., 1]).log().abs() > 0.05
    assert clear.sum() >= 4
    pattern = layout.classify(q, k, v, grid)
    assert torch.equal(pattern[clear], (exact[..., 1] < exact[..., 0]).long()[clear])


def test_keys_far_below_a_rows_best_weigh_nothing():
    """Where a band sees only such keys its output is 0, and its error 1."""
    grid = TokenGrid(4, 2, 4)
    q, k, v = (x.float() for x in qkv(grid))
    q, k = torch.full_like(q, 60), torch.full_like(k, -60)
    k[:, :, -1] = 0
    error = small(density=0.01, sink_frames=0, rows=4).errors(q, k, v, grid)
    torch.testing.assert_close(error[..., 0], torch.ones_like(error[..., 0]))
    assert error.isfinite().all()


@pytest.mark.parametrize(("tokens", "rows"), [(1000, 64), (75_600, 64), (10, 64), (1, 1)])
def test_sampled_rows_are_spread_over_the_whole_sequence(tokens, rows):
    found = sampled_rows(tokens, rows)
    assert len(found) == min(rows, tokens) and len(found.unique()) == len(found)
    part = tokens / len(found)
    start = torch.arange(len(found)) * part
    assert (found > start - 1).all() and (found < start + part).all()


def test_sampled_rows_do_not_fall_into_step_with_a_grid():
    column = sampled_rows(21 * 30 * 52, 60) % 52
    assert len(column.unique()) > 25


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("max_error", [None, 0.5, 0.0])
def test_everything_selected_equals_dense_attention(grid, max_error):
    q, k, v = qkv(grid)
    attention = SparseAttention(method(small(max_error=max_error), 1.0), 3)
    out = attention(q, k, v, grid, torch.ones(2))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("grid", GRIDS)
def test_permute_and_unpermute_are_inverse(grid):
    q, k, v = qkv(grid, heads=8)
    for layout in small()(q, k, v, grid):
        assert torch.equal(layout.unpermute(layout.permute(q)), q)


@pytest.mark.parametrize("grid", [GRID, TokenGrid(5, 3, 7), TokenGrid(3, 2, 5, 3, 9)])
def test_a_budget_is_text_then_by_turns_near_sinks_and_a_band_from_the_diagonal_outwards(grid):
    q, k, v = heads_of(TokenGrid(grid.frames, grid.height, grid.width), "frame", "position")
    pad = (0, 0, grid.text_before, grid.text_after)
    q, k, v = (F.pad(x, pad) for x in (q, k, v))
    layouts = small()(q, k, v, grid)
    assert layouts[0].pattern.tolist() == [[SPATIAL, TEMPORAL]]
    score = Estimator()(q, k, v, *layouts).score
    torch.testing.assert_close(score.sum(-1), torch.ones(score.shape[:-1]))
    token = torch.arange(grid.num_video)
    positions = grid.height * grid.width
    places = [token, token % positions * grid.frames + token // positions]
    for head in range(2):
        means, where, sinks = [], [], []
        for layout in layouts:
            text = layout.text if layout.text is not None else torch.zeros(layout.num_blocks)
            mean, position = torch.zeros(2, layout.num_blocks, dtype=torch.float64)
            sink = torch.zeros(layout.num_blocks, dtype=torch.bool)
            for i in range(layout.num_blocks):
                start, end = layout.offsets[i : i + 2].tolist()
                members = layout.order[0, head, start:end] - grid.text_before
                if not text[i]:
                    mean[i] = places[head][members].double().mean()
                    position[i] = (members % positions).double().mean()
                    sink[i] = (members < positions).double().mean() >= 0.5
            means.append(mean)
            where.append(position)
            sinks.append(sink)
        text = layouts[1].text if layouts[1].text is not None else torch.zeros(len(means[1]))
        for i, row in enumerate(score[0, head]):
            if layouts[0].text is not None and layouts[0].text[i]:
                continue
            ranked = row.argsort(descending=True, stable=True)
            num_text, num_sinks = int(text.sum()), int(sinks[1].sum())
            assert text[ranked[:num_text]].all() and num_sinks > 0
            ranked = ranked[num_text:]
            of_sinks, of_band = ranked[sinks[1][ranked]], ranked[~sinks[1][ranked]]
            turns = min(num_sinks, len(of_band))
            assert torch.equal(ranked[: 2 * turns : 2], of_sinks[:turns])
            assert torch.equal(ranked[1 : 2 * turns : 2], of_band[:turns])
            assert ((means[1][of_band] - means[0][i]).abs().diff() >= -1e-4).all()
            assert ((where[1][of_sinks] - where[0][i]).abs().diff() >= -1e-4).all()


def test_a_budget_as_large_as_the_sinks_has_a_band():
    grid = TokenGrid(16, 8, 8)  # the first frame is 1 / 16 of it
    q, k, v = heads_of(grid, "frame", "position", sharpness=30.0)
    attention = SparseAttention(method(HeadPattern(q_block=16, kv_block=16), 1 / 16), 2)
    attention(q, k, v, grid, torch.ones(1))
    mask = attention.mask
    assert float(mask.density.mean()) == 1 / 16
    q, k = mask.q_layout.permute(q), mask.kv_layout.permute(k)
    mass = Oracle()(q, k, k, mask.q_layout, mask.kv_layout).score
    assert (mask.captured(mass) > 0.3).all()
    sinks = torch.zeros_like(mask.selected)
    sinks[..., :4] = True  # all of that budget on the first frame
    assert (replace(mask, selected=sinks).captured(mass) < 0.1).all()


def test_first_frames_are_blocks_of_their_own_in_both_orders():
    q, k, v = heads_of(GRID, "frame", "position")
    kv_layout = small()(q, k, v, GRID)[1]
    assert sorted(kv_layout.order[0, 0, :24].tolist()) == list(range(24))
    assert torch.equal(kv_layout.order[0, 0, :24], kv_layout.order[0, 1, :24])
    none = small(sink_frames=0)(q, k, v, GRID)[0]
    assert (none.score[SPATIAL].diagonal() >= none.score[SPATIAL][:, 0]).all()


def test_temporal_heads_lose_less_in_temporal_than_in_frame_major_order():
    q, k, v = heads_of(GRID, "position", "position", sharpness=20.0)
    dense = F.scaled_dot_product_attention(q, k, v)
    out = SparseAttention(method(small(sink_frames=0)), 2)(q, k, v, GRID, torch.ones(1))
    forced = small(sink_frames=0)
    forced.classify = lambda q, *_: torch.zeros(q.shape[:2], dtype=torch.long)
    wrong = SparseAttention(method(forced), 2)(q, k, v, GRID, torch.ones(1))
    assert (out - dense).norm() < 0.2 * (wrong - dense).norm()


def test_heads_of_neither_pattern_take_the_scores_of_block_means():
    q, k, v = heads_of(GRID, "frame", None)
    layouts = small(max_error=0.5, sink_frames=0)(q, k, v, GRID)
    assert layouts[0].pattern.tolist() == [[SPATIAL, NEITHER]]
    q, k = layouts[0].permute(q), layouts[1].permute(k)
    score, mass = (e(q, k, v, *layouts).score for e in (Estimator(), MeanPool()))
    assert torch.equal(score[:, 1], mass[:, 1]) and not torch.equal(score[:, 0], mass[:, 0])


def test_the_same_inputs_give_the_same_mask_and_constant_ones_are_spatial():
    q, k, v = qkv(GRID)
    first, second = (SparseAttention(method(small()), 3) for _ in range(2))
    for attention in (first, second):
        attention(q, k, v, GRID, torch.ones(2))
    assert torch.equal(first.mask.selected, second.mask.selected)
    constant = torch.ones_like(q)
    assert (small().classify(constant, constant, constant, GRID) == SPATIAL).all()


def test_the_layout_of_the_recompute_is_that_of_the_mask():
    q, k, v = heads_of(GRID, "frame", "position")
    attention = SparseAttention(method(small()), 2)
    attention(q, k, v, GRID, torch.ones(1))
    kept = attention(q.flip(1), k.flip(1), v.flip(1), GRID, torch.ones(1))  # same mask and orders
    attention.reset()
    anew = attention(q.flip(1), k.flip(1), v.flip(1), GRID, torch.ones(1))
    assert not torch.allclose(kept, anew)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.77, 1.0])
def test_a_band_of_the_width_has_the_density(density):
    tokens = 400
    place = torch.arange(tokens)
    band = (place[:, None] - place[None, :]).abs() <= band_width(density, tokens)
    assert float(band.float().mean()) == pytest.approx(density, abs=1 / tokens)


def test_the_width_is_that_of_the_paper():
    positions, tokens, density = 1560, 32_760, 0.3
    mul = tokens * (1 - (1 - density) ** 0.5) / positions
    assert band_width(density, tokens) == pytest.approx(mul * positions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"density": 1.5}, "density=1.5: allowed is a share from 0 to 1"),
        ({"sink_frames": -1}, "sink_frames=-1"),
        ({"max_error": -0.1}, "max_error=-0.1"),
        ({"max_error": float("nan")}, "max_error=nan"),
        ({"rows": 0}, "rows=0"),
        ({"q_block": 2.5}, "q_block=2.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        HeadPattern(**arguments)


def test_the_estimator_refuses_a_layout_that_gives_heads_no_pattern():
    with pytest.raises(ValueError, match=r"layout=RowMajor: allowed is .*\.HeadPattern"):
        method(RowMajor())


def test_a_grid_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 tokens but q has 192"):
        small()(*qkv(GRID), TokenGrid(1, 4, 4))
