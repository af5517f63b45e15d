import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(3, 4, 6)


def qkv(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, GRID.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def attention(k=0.3, compensation=None, layout=None, estimator=None):
    method = SparseMethod(
        layout=layout or Tiles(block=(2, 2, 4)),
        estimator=estimator or MeanPool(),
        policy=Hybrid(k=k),
        compensation=compensation or Centroid(),
    )
    return SparseAttention(method, num_heads=3)


T = torch.ones(2)


@pytest.mark.parametrize("estimator", [MeanPool(), Oracle()])
@pytest.mark.parametrize("compensation", [Drop(), Centroid()])
@pytest.mark.parametrize("layout", [Tiles(block=(2, 2, 4)), RowMajor(q_block=16, kv_block=7)])
def test_full_mask_equals_dense_attention(estimator, compensation, layout):
    q, k, v = qkv()
    out = attention(1.0, compensation, layout, estimator)(q, k, v, GRID, T)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_centroids_bring_the_output_closer_to_dense_attention():
    q, k, v = qkv()
    dense = F.scaled_dot_product_attention(q, k, v)
    dropped = attention(0.2, Drop())(q, k, v, GRID, T)
    compensated = attention(0.2, Centroid())(q, k, v, GRID, T)
    assert (compensated - dense).norm() < 0.8 * (dropped - dense).norm()


def test_blocks_of_equal_keys_are_compensated_exactly():
    q, k, v = qkv()
    layout = Tiles(block=(1, 4, 6)).build(GRID)[0]
    sizes = layout.sizes
    k, v = (x[:, :, : len(sizes)].repeat_interleave(sizes, dim=2) for x in (k, v))
    out = attention(0.3, Centroid(), Tiles(block=(1, 4, 6)))(q, k, v, GRID, T)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_the_mask_is_kept_until_reset():
    sparse = attention(0.2)
    first = sparse(*qkv(0), GRID, T)
    mask = sparse.mask
    sparse(*qkv(1), GRID, T)
    assert sparse.mask is mask
    sparse.reset()
    assert torch.equal(sparse(*qkv(0), GRID, T), first)
    assert sparse.mask is not mask


def test_permuting_the_batch_permutes_the_output():
    q, k, v = qkv(dtype=torch.float32)
    straight, flipped = attention(), attention()
    out = straight(q, k, v, GRID, T)
    out_flipped = flipped(q.flip(0), k.flip(0), v.flip(0), GRID, T)
    assert torch.equal(flipped.mask.selected.flip(0), straight.mask.selected)
    torch.testing.assert_close(out_flipped.flip(0), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compensation", [Drop(), Centroid()])
def test_gradients_reach_q_k_and_v_and_match_finite_differences(compensation):
    grid = TokenGrid(1, 2, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 3, 8, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    )
    sparse = attention(0.5, compensation, Tiles(block=(1, 2, 2)))
    sparse(q, k, v, grid, T)  # fixes the mask, as a step does
    assert torch.autograd.gradcheck(lambda *x: sparse(*x, grid, T), (q, k, v))


def test_the_oracle_scores_are_the_true_mass_of_each_block():
    q, k, v = qkv()
    layout, _ = RowMajor(q_block=8, kv_block=8).build(GRID)
    score = Oracle()(q, k, v, layout, layout).score
    mass = (q @ k.transpose(-1, -2) / 4).softmax(-1)  # [B, H, S, S]
    expected = mass.unflatten(-1, (9, 8)).sum(-1).unflatten(-2, (9, 8)).mean(-2)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_pool_rows_sum_to_one_and_follow_the_pooled_logits():
    q, k, v = qkv()
    q_layout, kv_layout = RowMajor(q_block=16, kv_block=7).build(GRID)
    score = MeanPool()(q, k, v, q_layout, kv_layout).score
    for i, row in enumerate(q.split(16, 2)):
        means = torch.stack([block.mean(2) for block in k.split(7, 2)], 2)  # [B, H, Nk, D]
        sizes = torch.tensor([block.shape[2] for block in k.split(7, 2)])
        logits = torch.einsum("bhd,bhnd->bhn", row.mean(2), means) / 4
        expected = (sizes * logits.exp()) / (sizes * logits.exp()).sum(-1, keepdim=True)
        torch.testing.assert_close(score[:, :, i].double(), expected, rtol=1e-5, atol=1e-6)
