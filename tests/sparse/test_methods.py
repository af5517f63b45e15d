"""Published methods by name: their rows, their density on tiles and clusters, what is refused."""

import pytest
import torch

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.estimators.mean_pool import MeanPool, self_similarity
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.layouts.head_pattern import NEITHER, SPATIAL, TEMPORAL
from gossamer.sparse.methods import NAMES, method_named
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(6, 8, 16)
SMALL = {
    "sparge": {"q_block": 32, "kv_block": 16},
    "svg1": {"q_block": 32, "kv_block": 16},
    "svg2": {"num_q": 24, "num_kv": 96},
    "svg_ear": {"num_q": 24, "num_kv": 96},
}
PARTS = {
    "sparge": ("RowMajor", "MeanPool", "Hybrid", "Drop"),
    "svg1": ("HeadPattern", "HeadPattern", "Hybrid", "Drop"),
    "svg2": ("SemanticClusters", "MeanPool", "TokenHybrid", "Drop"),
    "svg_ear": ("SemanticClusters", "ErrorAware", "ErrorBudget", "Centroid"),
}


def clustered(seed=0):
    """q, k, v [1, 2, S, 16] around centers of which some have most of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(2, 1, 2, 32, 16, generator=generator)
    place = (32 * torch.rand(GRID.num_tokens, generator=generator) ** 3).long()
    noise = torch.randn(2, 1, 2, GRID.num_tokens, 16, generator=generator)
    q, k = centers[..., place, :] + 0.3 * noise
    return q, k, torch.randn(q.shape, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_a_row_of_the_product(name):
    method = method_named(name, 0.9)
    parts = (method.layout, method.estimator, method.policy, method.compensation)
    assert tuple(type(part).__name__ for part in parts) == PARTS[name]
    assert float(method.policy.k) == pytest.approx(0.1) and float(method.policy.p) == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("name", NAMES)
def test_the_sparsity_is_met_in_token_pairs(name, sparsity):
    attention = SparseAttention(method_named(name, sparsity, **SMALL[name]), num_heads=2)
    out = attention(*clustered(), GRID, torch.ones(1))
    assert out.isfinite().all() and attention.mask is not None
    sizes = attention.mask.kv_layout.sizes.expand(1, 2, -1).double()
    if name.startswith("svg_") or name == "svg2":
        assert sizes.amax() > 4 * sizes.mean()
        assert (attention.mask.density - (1 - sparsity)).abs().max() < 0.01
    else:
        rows = (attention.mask.selected.double() @ sizes[..., None])[..., 0]
        wanted = (1 - sparsity) * GRID.num_tokens
        assert ((rows - wanted).abs() <= sizes.amax()).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_sparsity_is_dense_attention(name):
    attention = SparseAttention(method_named(name, 0.0, **SMALL[name]), num_heads=2).double()
    q, k, v = (x.double() for x in clustered())
    dense = (q @ k.mT / 4).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, GRID, torch.ones(1)), dense, rtol=1e-5, atol=1e-5)


def test_sparge_keeps_the_blocks_of_most_pooled_attention_and_no_others():
    """SpargeAttention's meansim_topk with its defaults: no guard, no second filter."""
    q, k, v = clustered()
    attention = SparseAttention(method_named("sparge", 0.75, **SMALL["sparge"]), num_heads=2)
    attention(q, k, v, GRID, torch.ones(1))
    q_mean, k_mean = q.unflatten(2, (24, 32)).mean(3), k.unflatten(2, (48, 16)).mean(3)
    best = (q_mean @ k_mean.mT).topk(12, dim=-1).indices
    expected = torch.zeros(1, 2, 24, 48, dtype=torch.bool).scatter_(-1, best, True)
    assert torch.equal(attention.mask.selected, expected)


def test_the_whole_of_spargeattention_guards_blocks_and_decides_its_own_sparsity():
    layout, q, k, v = RowMajor(**SMALL["sparge"]), *clustered()
    q_layout, kv_layout = layout(q, k, v, GRID)
    alike = self_similarity(q, k, q_layout, kv_layout)
    threshold = max(float(x.quantile(0.1)) for x in alike)
    part = MeanPool(similarity=threshold)
    method = SparseMethod(
        layout, part, Hybrid(k=0, p=0.9, keep_crossing=False), FilteredDrop(skip_below=-5.0)
    )
    attention = SparseAttention(method, num_heads=2)
    out = attention(q, k, v, GRID, torch.ones(1))
    q_odd, kv_odd = (x < threshold for x in alike)
    selected, score = attention.mask.selected, part(q, k, v, q_layout, kv_layout).score
    assert q_odd.any() and kv_odd.any()
    assert selected[q_odd].all() and selected.transpose(-1, -2)[kv_odd].all()
    free = ~q_odd[..., None] & ~kv_odd[..., None, :]
    mass = (score * (selected & free)).sum(-1)[~q_odd]
    rows = (selected & free).sum(-1)[~q_odd]
    assert ((mass <= 0.9 + 1e-6) | (rows == 1)).all() and (mass > 0.5).any()
    kept = (q @ k.mT / 4).masked_fill(
        ~selected.repeat_interleave(32, 2).repeat_interleave(16, 3), -torch.inf
    )
    unfiltered = kept.softmax(-1) @ v
    change = (out - unfiltered).norm() / unfiltered.norm()
    assert 0 < change < 0.05


def test_an_svg1_head_with_neither_band_takes_blocks_by_pooled_attention_at_the_same_sparsity():
    q, k, v = clustered()
    frame = torch.arange(GRID.num_tokens) // 128 / 6
    band = 12 * torch.stack([(3 * frame).cos(), (3 * frame).sin()], -1)
    q[:, 0], k[:, 0] = (torch.nn.functional.pad(band, (0, 14)) for _ in range(2))
    masks = {}
    for name, more in (("better", {}), ("neither", {"max_error": 0.5})):
        attention = SparseAttention(method_named("svg1", 0.75, **SMALL["svg1"], **more), 2)
        attention(q, k, v, GRID, torch.ones(1))
        masks[name] = attention.mask
    assert masks["better"].q_layout.pattern.tolist() == [[SPATIAL, TEMPORAL]]
    assert masks["neither"].q_layout.pattern.tolist() == [[SPATIAL, NEITHER]]
    assert torch.equal(masks["neither"].selected[:, 0], masks["better"].selected[:, 0])
    layouts = masks["neither"].q_layout, masks["neither"].kv_layout
    inner = layouts[0].permute(q), layouts[1].permute(k), layouts[1].permute(v)
    pooled = Hybrid(k=0.25)(MeanPool()(*inner, *layouts)).selected
    assert torch.equal(masks["neither"].selected[:, 1], pooled[:, 1])
    assert not torch.equal(pooled[:, 1], masks["better"].selected[:, 1])
    torch.testing.assert_close(masks["neither"].density, masks["better"].density)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("svg_er", 0.9), r"method=svg_er: allowed is sparge, .*did you mean svg_ear\?"),
        (("nothing_near", 0.9), "method=nothing_near: allowed is .*; name one of them"),
        (("svg2", 1.0), r"sparsity=1\.0: allowed is .*; e\.g\. 0\.9"),
        (("svg2", -0.1), r"sparsity=-0\.1"),
        (("svg2", float("nan")), "sparsity=nan"),
    ],
)
def test_a_wrong_name_or_sparsity_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        method_named(*arguments)
    assert "\n" not in str(error.value)
