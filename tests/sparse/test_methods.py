"""Published methods by name: their rows, their density on tiles and clusters, what is refused."""

import pytest
import torch

from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.methods import NAMES, method_named

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
