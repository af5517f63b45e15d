"""Clusters as layouts: partitions, order, edges, text, and attention through them."""

import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.gates import find_band
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.layouts.clusters import SemanticClusters, SortedClusters, along_component
from gossamer.sparse.policies import Hybrid, TrainedHybrid

GRID = TokenGrid(3, 4, 6)
TEXT = TokenGrid(2, 4, 6, text_before=3, text_after=5)
T = torch.ones(2)
LAYOUTS = [
    SemanticClusters(num_q=4, num_kv=9, cold_iterations=3),
    SortedClusters(q_block=16, kv_block=7, num_q=4, num_kv=9, cold_iterations=3),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["own", "sorted"])


def qkv(grid=GRID, seed=0, dtype=torch.float64, heads=3, batch=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, grid.num_tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def attention(layout, policy=None, estimator=None, compensation=None):
    parts = (layout, estimator or MeanPool(), policy or Hybrid(k=0.3), compensation or Drop())
    return SparseAttention(SparseMethod(*parts), num_heads=3)


@layouts
@pytest.mark.parametrize("grid", [GRID, TEXT])
@pytest.mark.parametrize("compensation", [Drop(), Centroid()])
@pytest.mark.parametrize("estimator", [MeanPool(), ErrorAware(), ErrorAware(kind="keys")])
def test_full_mask_equals_dense_attention(layout, grid, compensation, estimator):
    q, k, v = qkv(grid)
    out = attention(layout, Hybrid(k=1.0), estimator, compensation)(q, k, v, grid, T)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@layouts
@pytest.mark.parametrize("grid", [GRID, TEXT])
def test_layouts_are_partitions_and_permuting_has_an_inverse(layout, grid):
    q, k, v = qkv(grid)
    for part, planned, x in zip(layout(q, k, v, grid), layout.build(grid), (q, k), strict=True):
        assert part.num_blocks == planned.num_blocks
        assert (part.offsets[..., 0] == 0).all() and (part.offsets[..., -1] == x.shape[2]).all()
        assert (part.sizes >= 0).all() and part.sizes.max() <= part.block_size
        everyone = torch.arange(x.shape[2]).expand(x.shape[:3])
        assert torch.equal(part.order.sort(-1).values, everyone)
        assert torch.equal(part.unpermute(part.permute(x)), x)


@layouts
def test_text_has_blocks_of_its_own_that_stay_dense(layout):
    q, k, v = qkv(TEXT)
    sparse = attention(layout, Hybrid(k=0.0))
    sparse(q, k, v, TEXT, T)
    mask = sparse.mask
    is_text = TEXT.is_text()
    for part in (mask.q_layout, mask.kv_layout):
        for b, h in ((0, 0), (1, 2)):
            offsets = part.offsets if part.offsets.ndim == 1 else part.offsets[b, h]
            blocks = part.order[b, h].tensor_split(offsets[1:-1].tolist())
            for text, tokens in zip(part.text, blocks, strict=True):
                assert bool(text) == bool(is_text[tokens].any()) or not len(tokens)
                assert is_text[tokens].all() == is_text[tokens].any() or not len(tokens)
    assert mask.selected[..., mask.q_layout.text, :].all()
    assert mask.selected[..., mask.kv_layout.text].all()


@layouts
def test_density_equals_a_count_over_tokens(layout):
    q, k, v = qkv(TEXT)
    sparse = attention(layout)
    sparse(q, k, v, TEXT, T)
    mask = sparse.mask
    for b in range(2):
        for h in range(3):
            rows, columns = (
                (x.offsets if x.offsets.ndim == 1 else x.offsets[b, h])
                for x in (mask.q_layout, mask.kv_layout)
            )
            allowed = mask.selected[b, h].repeat_interleave(rows.diff(), 0)
            allowed = allowed.repeat_interleave(columns.diff(), 1)
            assert mask.density[b, h] == allowed.double().mean()


def test_sorted_tiles_keep_clusters_together_along_the_component():
    q, k, _ = qkv()
    layout = SortedClusters(q_block=16, kv_block=8, num_q=4, num_kv=9, cold_iterations=3)
    _, kv_layout, codebook = layout.cluster(q, k, GRID, None)
    place = along_component(codebook.k, torch.ones(codebook.k.shape[:3], dtype=k.dtype))
    assert kv_layout.is_uniform and kv_layout.offsets.ndim == 1
    assert place.shape == (2, 3, 9)
    labels = codebook.k_labels.gather(2, kv_layout.order)
    changes = (labels.diff(dim=-1) != 0).sum(-1)
    present = torch.tensor([[len(x.unique()) for x in row] for row in labels])
    assert torch.equal(changes, present - 1)  # each cluster is one run


def test_the_component_is_the_eigenvector_of_the_covariance():
    x = torch.randn(1, 1, 40, 8, dtype=torch.float64) * torch.linspace(3, 0.5, 8)
    x = x.double()
    centered = x[0, 0] - x[0, 0].mean(0)
    vector = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    vector = vector * vector[vector.abs().argmax()].sign()
    place = along_component(x, torch.ones(1, 1, 40, dtype=torch.float64))[0, 0]
    cosine = torch.cosine_similarity(place, centered @ vector, dim=0)
    assert cosine > 0.999


@layouts
@pytest.mark.parametrize("kind", ["constant", "duplicates", "one token"])
@pytest.mark.parametrize("estimator", [MeanPool(), ErrorAware()])
def test_degenerate_inputs_give_finite_attention(layout, kind, estimator):
    grid = TokenGrid(1, 1, 1) if kind == "one token" else GRID
    q, k, v = qkv(grid)
    if kind == "constant":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif kind == "duplicates":
        k = k[:, :, :3].repeat(1, 1, 24, 1)
    else:
        layout = type(layout)()
    out = attention(layout, Hybrid(k=1.0), estimator, Centroid())(q, k, v, grid, T)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    few = attention(layout, Hybrid(k=0.2), estimator, Centroid())(q, k, v, grid, T)
    assert few.isfinite().all()


def test_empty_clusters_have_no_tokens_and_no_weight():
    q, k, v = qkv()
    k = k[:, :, :3].repeat(1, 1, 24, 1)  # three different keys for nine clusters
    v = v[:, :, :3].repeat(1, 1, 24, 1)
    sparse = attention(LAYOUTS[0], Hybrid(k=0.0), compensation=Centroid())
    out = sparse(q, k, v, GRID, T)
    assert (sparse.mask.kv_layout.sizes == 0).sum() == 2 * 3 * 6
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@layouts
def test_the_layout_of_a_step_is_kept_for_the_recompute(layout):
    q, k, v = qkv()
    sparse = attention(layout)
    sparse.train()
    first = sparse(q, k, v, GRID, T)
    mask = sparse.mask
    again = sparse(q + 1e-3 * torch.randn_like(q), k.flip(2), v, GRID, T)
    assert sparse.mask is mask and not torch.equal(first, again)
    assert torch.equal(sparse(q, k, v, GRID, T), first)


@layouts
def test_gradients_match_finite_differences_through_clusters(layout):
    grid = TokenGrid(1, 2, 5)
    q, k, v = (x[:, :, :, :4].clone().requires_grad_() for x in qkv(grid, batch=1))
    small = type(layout)(num_q=2, num_kv=3)
    sparse = attention(small, Hybrid(k=0.5), compensation=Centroid())
    sparse(q, k, v, grid, T)
    assert torch.autograd.gradcheck(lambda *x: sparse(*x, grid, T), (q, k, v))


@layouts
@pytest.mark.parametrize("policy", [Hybrid(k=0.3, p=0.2), ErrorBudget(k=0.3, scope="head")])
def test_a_sample_has_the_same_mask_alone_and_in_a_batch(layout, policy):
    # So one process with a batch of two and two processes with one each agree.
    q, k, v = qkv(dtype=torch.float32)
    together = attention(layout, policy, ErrorAware())
    together(q, k, v, GRID, T)
    for b in range(2):
        alone = attention(layout, policy, ErrorAware())
        alone(*(x[b : b + 1] for x in (q, k, v)), GRID, T[:1])
        assert torch.equal(alone.mask.selected[0], together.mask.selected[b])
        assert torch.equal(alone.mask.kv_layout.order[0], together.mask.kv_layout.order[b])


def test_the_layouts_of_the_first_samples_are_slices():
    q, k, _ = qkv()
    for layout in LAYOUTS:
        part = layout(q, k, k, GRID)[1]
        one = part.of_first(1)
        assert torch.equal(one.permute(k[:1]), part.permute(k)[:1])
        assert torch.equal(one.sizes, part.sizes[:1] if part.sizes.ndim > 1 else part.sizes)


def test_counts_follow_the_tokens_unless_given():
    assert SemanticClusters().counts(TokenGrid(21, 30, 52)) == (128, 512)
    assert SemanticClusters().counts(TokenGrid(1, 1, 1)) == (1, 1)
    assert SortedClusters(num_q=7, num_kv=5).counts(GRID) == (7, 5)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (SemanticClusters, {"num_q": 0}, "num_q=0"),
        (SemanticClusters, {"iterations": 0}, "iterations=0"),
        (SemanticClusters, {"keep_until": -0.1}, "keep_until=-0.1"),
        (SortedClusters, {"kv_block": 0}, "kv_block=0"),
    ],
)
def test_bad_settings_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_more_clusters_than_tokens_are_refused():
    q, k, _ = qkv()
    with pytest.raises(ValueError, match="num_kv=73: allowed is at most the 72 video tokens"):
        SemanticClusters(num_kv=73)(q, k, k, GRID)


def test_a_grid_of_another_length_is_refused():
    q, k, _ = qkv()
    with pytest.raises(ValueError, match="24 tokens but q has 72"):
        SemanticClusters()(q, k, k, TokenGrid(1, 4, 6))


@layouts
def test_the_band_of_a_trained_budget_counts_each_heads_own_blocks(layout):
    q, k, v = qkv()
    q_layout, kv_layout = layout(q, k, v, GRID)
    inner = q_layout.permute(q), kv_layout.permute(k), kv_layout.permute(v)
    scores = MeanPool()(*inner, q_layout, kv_layout)
    band = find_band(scores, Hybrid(k=0.3)(scores), 2)
    pairs = q_layout.sizes[..., :, None] * kv_layout.sizes[..., None, :]
    share = (pairs / GRID.num_tokens**2).expand_as(scores.score)
    torch.testing.assert_close(band.area, share.gather(-1, band.column))


def test_budgets_train_through_sorted_clusters():
    q, k, v = qkv(dtype=torch.float32)
    sparse = attention(LAYOUTS[1], TrainedHybrid(k=0.3))
    sparse(q.requires_grad_(), k, v, GRID, T).square().sum().backward()
    assert sparse.policy.k_shift.grad.isfinite().all() and sparse.policy.k_shift.grad.any()
