"""The masks that are timed have the density, the skew and the tails that the table names."""

import pytest
import torch

from gossamer.benchmarks.cases import (
    SHAPES,
    SINKS,
    SKEW,
    Case,
    cases,
    clusters,
    layouts,
    random_mask,
)
from gossamer.benchmarks.cases import row_counts as count_rows

CPU = torch.device("cpu")
BLOCKS = [(64, 64), (128, 64), (128, 128)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_ends_in_a_true_tail(name: str, block: tuple[int, int]) -> None:
    tokens = SHAPES[name].tokens
    for layout, size in zip(layouts(tokens, block, CPU), block, strict=True):
        assert int(layout.offsets[-1]) == tokens and layout.is_uniform
        assert set(layout.sizes[:-1].tolist()) == {size}
        assert 0 < int(layout.sizes[-1]) == tokens % size < size


@pytest.mark.parametrize("rows", ["uniform", "skewed"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.97])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_count_is_the_density_within_a_block(
    name: str, sparsity: float, rows: str
) -> None:
    shape = SHAPES[name]
    for q_block, kv_block in BLOCKS:
        num_q, num_kv = -(-shape.tokens // q_block), -(-shape.tokens // kv_block)
        counts = count_rows(Case((q_block, kv_block), sparsity, rows), shape.heads, num_q, num_kv)
        mean = counts.double().mean().item()
        assert mean == pytest.approx((1 - sparsity) * num_kv, abs=0.5 if rows == "uniform" else 0.1)


def test_skewed_counts_vary_seven_fold_and_between_heads_and_rows() -> None:
    counts = count_rows(Case((64, 64), 0.8, "skewed"), 12, 512, 512).double()
    assert counts.max() / counts.min() == pytest.approx(SKEW, rel=0.05)
    for per in (counts.mean(0), counts.mean(1)):
        assert per.max() / per.min() == pytest.approx(SKEW**0.5, rel=0.05)


@pytest.mark.parametrize("rows", ["uniform", "skewed"])
def test_rows_select_their_count_of_different_columns(rows: str) -> None:
    case = Case((16, 8), 0.75, rows)
    mask = random_mask(case, 3, *layouts(1000, case.block, CPU))
    counts = count_rows(case, 3, 63, 125)
    assert torch.equal(mask.selected.sum(-1)[0], counts)
    assert float(mask.density.mean()) == pytest.approx(0.25, abs=0.01)
    assert len({tuple(row.tolist()) for row in mask.selected.flatten(0, 2)}) == 3 * 63
    assert mask.selected.any(-2).all(), "some column is never selected"


def test_skewed_rows_of_a_head_share_their_sinks() -> None:
    case = Case((16, 8), 0.75, "skewed")
    shared = random_mask(case, 3, *layouts(1000, case.block, CPU)).selected.all(-2)  # [1, 3, 125]
    assert shared.sum(-1).tolist() == [[SINKS] * 3]
    assert not torch.equal(shared[0, 0], shared[0, 1])
    uniform = Case((16, 8), 0.75, "uniform")
    assert not random_mask(uniform, 3, *layouts(1000, uniform.block, CPU)).selected.all(-2).any()


def test_a_mask_is_the_same_every_time() -> None:
    case = Case((16, 8), 0.75, "skewed")
    first, second = (random_mask(case, 2, *layouts(200, case.block, CPU)) for _ in range(2))
    assert torch.equal(first.selected, second.selected)


def test_sparsity_0_selects_all_and_has_no_skewed_rows() -> None:
    found = cases(((16, 8),), (0.0, 0.9), ("uniform", "skewed"))
    assert [(case.sparsity, case.rows) for case in found] == [
        (0.0, "uniform"),
        (0.9, "uniform"),
        (0.9, "skewed"),
    ]
    assert random_mask(found[0], 2, *layouts(100, (16, 8), CPU)).selected.all()


def test_clusters_vary_in_size_around_the_mean_and_from_head_to_head() -> None:
    pair = clusters(75_600, 8, (252, 76), CPU)
    for layout, mean in zip(pair, (252, 76), strict=True):
        sizes = layout.sizes.double()
        assert layout.block_size == 75_600 and not layout.is_uniform
        assert sizes.sum(-1).eq(75_600).all() and sizes.min() >= 0
        assert sizes.mean() == pytest.approx(mean, rel=0.01)
        assert 0.4 < sizes.std() / sizes.mean() < 0.7
        assert not torch.equal(sizes[0, 0], sizes[0, 1])
    mask = random_mask(Case((252, 76), 0.9, "clusters"), 8, *pair)
    assert float(mask.density.mean()) == pytest.approx(0.1, abs=0.005)
