from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.estimators.mean_pool import MeanPool, self_similarity
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.mask import keep_text
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(3, 4, 6)
GRIDS = [GRID, TokenGrid(1, 1, 1), TokenGrid(1, 3, 5), TokenGrid(5, 1, 1), TokenGrid(2, 3, 5, 3, 9)]


def qkv(grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, grid.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def gram(x, layout):
    """The mean of each block's Gram matrix of normalised tokens, formed in full."""
    x = x / x.norm(dim=-1, keepdim=True)
    ends = layout.offsets.tolist()
    blocks = [x[:, :, a:b] for a, b in pairwise(ends)]
    return torch.stack([(b @ b.transpose(-1, -2)).mean((-2, -1)) for b in blocks], -1)


@pytest.mark.parametrize("layout", [RowMajor(q_block=16, kv_block=7), Tiles(block=(2, 3, 4))])
def test_self_similarity_is_the_mean_of_the_gram_matrix(layout):
    q, k, _ = qkv()
    q_layout, kv_layout = layout.build(GRID)
    q_alike, k_alike = self_similarity(q, k, q_layout, kv_layout)
    torch.testing.assert_close(q_alike, gram(q, q_layout))
    torch.testing.assert_close(k_alike, gram(k - k.mean(2, keepdim=True), kv_layout))


def test_what_all_keys_share_does_not_make_them_alike():
    q, k, v, layout, found = guarded(0.6)
    shared = torch.full((16,), 20.0, dtype=k.dtype)
    again = MeanPool(similarity=0.6)(q, k + shared, v, layout, layout)
    assert torch.equal(again.forced, found.forced) and found.forced.any()
    torch.testing.assert_close(again.score, found.score, rtol=1e-3, atol=1e-5)
    assert (gram(k + shared, layout) > 0.6).all()  # as they would seem


def guarded(theta):
    """q, k, v in row-major blocks of 8, some of them of nearly equal tokens, and their masks."""
    q, k, v = qkv()
    for x, blocks in ((q, (0, 3, 4)), (k, (1, 2, 7, 8))):
        for block in blocks:
            rows = slice(8 * block, 8 * block + 8)
            x[:, :, rows] = x[:, :, 8 * block : 8 * block + 1] + 0.1 * x[:, :, rows]
    layout, _ = RowMajor(q_block=8, kv_block=8).build(GRID)
    return q, k, v, layout, MeanPool(similarity=theta)(q, k, v, layout, layout)


def test_rows_and_columns_of_unlike_tokens_are_forced_and_leave_the_softmax():
    q, k, _, layout, found = guarded(0.6)
    rows = gram(q, layout) < 0.6
    columns = gram(k - k.mean(2, keepdim=True), layout) < 0.6
    assert rows.any() and columns.any() and not rows.all() and not columns.all()
    assert torch.equal(found.forced, rows[..., :, None] | columns[..., None, :])
    means = [x.unflatten(2, (9, 8)).mean(3) for x in (q, k)]
    logits = means[0] @ means[1].transpose(-1, -2) / 4
    logits = logits.masked_fill(columns[..., None, :], float("-inf"))
    torch.testing.assert_close(found.score.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)
    for policy in (Hybrid(k=0.2), Hybrid(k=0, p=0.5), Hybrid(k=0, p=0.5, keep_crossing=False)):
        assert (policy(found).selected | ~found.forced).all()


def test_the_guard_is_off_at_zero_and_takes_everything_above_one_block_of_equal_tokens():
    q, k, v, layout, found = guarded(0.0)
    plain = MeanPool()(q, k, v, layout, layout)
    assert not found.forced.any() and plain.forced is None
    torch.testing.assert_close(found.score, plain.score)
    everything = guarded(1.0)[-1]
    assert everything.forced.all() and (everything.score == 0).all()
    assert Hybrid(k=0.1)(everything).selected.all()


def test_a_higher_bar_forces_more():
    forced = [guarded(theta)[-1].forced for theta in (0.1, 0.3, 0.6, 0.9)]
    for fewer, more in pairwise(forced):
        assert not (fewer & ~more).any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("theta", [None, 0.3, 0.9])
def test_everything_selected_equals_dense_attention(grid, theta):
    q, k, v = qkv(grid)
    layout = RowMajor(q_block=16, kv_block=7)
    method = SparseMethod(layout, MeanPool(similarity=theta), Hybrid(k=1.0), Drop())
    out = SparseAttention(method, 3)(q, k, v, grid, torch.ones(2))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_constant_blocks_are_alike_and_give_finite_scores():
    x = torch.ones(1, 1, 72, 16)
    k = x * torch.tensor([1.0, -1.0, 0.0]).repeat(3).repeat_interleave(8)[:, None]
    layout, _ = RowMajor(q_block=8, kv_block=8).build(GRID)
    found = MeanPool(similarity=0.9)(x, k, x, layout, layout)
    expected = torch.tensor([False, False, True]).repeat(3).expand(1, 1, 9, 9)
    assert torch.equal(found.forced, expected)  # the third kind of keys is the mean: no direction
    assert found.score.isfinite().all() and (found.score > 0)[~expected].all()
    nothing = MeanPool(similarity=0.9)(0 * x, 0 * x, x, layout, layout)  # no direction: not alike
    assert nothing.forced.all() and nothing.score.isfinite().all()


def test_the_estimator_leaves_text_to_keep_text():
    grid = TokenGrid(2, 3, 5, text_before=3, text_after=9)
    q, k, v = qkv(grid)
    q_layout, kv_layout = RowMajor(q_block=8, kv_block=4).build(grid)
    mask = Hybrid(k=0.1)(MeanPool()(q, k, v, q_layout, kv_layout))
    assert not mask.selected[:, :, q_layout.text].all()
    kept = keep_text(mask).selected
    assert kept[:, :, q_layout.text].all() and kept[..., kv_layout.text].all()


@pytest.mark.parametrize("theta", [-0.1, 1.5, float("nan")])
def test_a_similarity_outside_zero_to_one_is_refused(theta):
    with pytest.raises(ValueError, match=r"similarity=.*allowed is 0 to 1, or null"):
        MeanPool(similarity=theta)
