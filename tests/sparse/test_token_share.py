"""Budgets in token pairs: density on blocks of unequal size, prefixes, and what stays the same."""

import pytest
import torch

from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.token_share import TokenHybrid, token_prefix

TOKENS = 4096


def skewed(count, seed, heads=3, empty=0):
    """A layout [1, H] whose largest blocks hold tens of times the tokens of the smallest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, heads, count, generator=generator).mul(1.2).exp()
    sizes = (weight / weight.sum(-1, keepdim=True) * TOKENS).floor().long()
    sizes[..., :empty] = 0
    sizes[..., -1] += TOKENS - sizes.sum(-1)
    offsets = torch.cat([torch.zeros_like(sizes[..., :1]), sizes.cumsum(-1)], -1).int()
    return BlockLayout(offsets, TOKENS)


def scores_on(q_layout, kv_layout, seed=0):
    """Scores that grow with the size of the block, as attention mass does; some heads peaked."""
    generator = torch.Generator().manual_seed(seed)
    heads = q_layout.sizes.shape[-2]
    shape = (1, heads, q_layout.num_blocks, kv_layout.num_blocks)
    logits = torch.randn(shape, generator=generator) * torch.linspace(0.2, 4, heads)[:, None, None]
    score = (logits + kv_layout.sizes[..., None, :].log()).softmax(-1)
    share = torch.rand(shape, generator=generator).softmax(-1)
    error = torch.rand(shape[:-1], generator=generator)
    return BlockScores(q_layout, kv_layout, share, mass=score, error=error), BlockScores(
        q_layout, kv_layout, score
    )


POLICIES = {
    "svg2": TokenHybrid,
    "row": lambda k: ErrorBudget(k=k, unit="tokens"),
    "head": lambda k: ErrorBudget(k=k, unit="tokens", scope="head", guaranteed=0.0),
}


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_density_is_within_one_point_on_skewed_clusters(name, density, seed):
    q_layout, kv_layout = skewed(48, seed), skewed(192, seed + 10, empty=3)
    assert kv_layout.sizes.amax() > 30 * kv_layout.sizes[kv_layout.sizes > 0].min()
    by_error, by_mass = scores_on(q_layout, kv_layout, seed)
    mask = POLICIES[name](k=density)(by_mass if name == "svg2" else by_error)
    pairs = torch.zeros(3, dtype=torch.float64)
    for head in range(3):
        for row, m in enumerate(q_layout.sizes[0, head].tolist()):
            kept = kv_layout.sizes[0, head][mask.selected[0, head, row]].sum()
            pairs[head] += m * float(kept)
    assert torch.allclose(pairs / TOKENS**2, mask.density[0])
    assert (mask.density - density).abs().max() < 0.01
    assert (mask.selected & (kv_layout.sizes > 0)[..., None, :]).any(-1).all()


def test_a_share_of_blocks_would_miss_the_density():
    q_layout, kv_layout = skewed(24, 0), skewed(128, 10)
    _, by_mass = scores_on(q_layout, kv_layout)
    assert (Hybrid(k=0.1)(by_mass).density - 0.1).abs().max() > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_prefixes_that_grow_with_the_budget(seed):
    q_layout, kv_layout = skewed(7, seed), skewed(20, seed + 50, empty=seed % 3)
    score = scores_on(q_layout, kv_layout, seed)[1].score
    before = torch.zeros_like(score, dtype=torch.bool)
    for share in (0.0, 0.03, 0.1, 0.3, 0.31, 0.7, 1.0):
        kept = token_prefix(score, q_layout, kv_layout, torch.tensor([share]))
        worth = score / kv_layout.sizes.clamp(min=1)[..., None, :]
        least = worth.masked_fill(~kept, 2).amin(-1)
        most_left = worth.masked_fill(kept, -1).amax(-1)
        assert (least >= most_left).all() and kept.any(-1).all()
        assert (kept | ~before).all()
        before = kept
    real = (kv_layout.sizes > 0)[..., None, :]
    assert (kept | ~real).all()


def test_heads_have_budgets_of_their_own_and_p_is_a_union():
    q_layout, kv_layout = skewed(24, 1), skewed(128, 11)
    scores = scores_on(q_layout, kv_layout)[1]
    policy = TokenHybrid(k=0.1).for_heads(3)
    assert type(policy) is TokenHybrid
    policy.set_budget(torch.tensor([0.05, 0.2, 0.6]), torch.zeros(3))
    own = policy(scores)
    torch.testing.assert_close(
        own.density[0], torch.tensor([0.05, 0.2, 0.6]).double(), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("keep_crossing", [True, False])
def test_p_lengthens_the_prefix_until_the_mass_is_reached(keep_crossing):
    q_layout, kv_layout = skewed(24, 1), skewed(128, 11)
    scores = scores_on(q_layout, kv_layout)[1]
    p = TokenHybrid(k=0.0, p=0.6, keep_crossing=keep_crossing)(scores).selected
    both = TokenHybrid(k=0.1, p=0.6, keep_crossing=keep_crossing)(scores).selected
    k = TokenHybrid(k=0.1)(scores).selected
    assert torch.equal(both, k | p) and (p & ~k).any() and (k & ~p).any()
    mass = (scores.score * p).sum(-1)
    last = (scores.score / kv_layout.sizes[..., None, :]).masked_fill(~p, 2).argmin(-1)
    ending = scores.score.gather(-1, last[..., None])[..., 0]
    if keep_crossing:
        assert (mass >= 0.6).all() and (mass - ending < 0.6).all()
    else:
        assert (mass[p.sum(-1) > 1] <= 0.6).all()
    assert TokenHybrid(k=0.0, p=1.0)(scores).selected.all()


def test_equal_blocks_give_what_a_share_of_blocks_gives():
    layout = BlockLayout(torch.arange(0, 33 * 16, 16).int(), 16, is_uniform=True)
    score = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0)).softmax(-1)
    scores = BlockScores(layout, layout, score)
    for k, p in ((0.25, 0.0), (0.125, 0.4), (1.0, 0.0)):
        assert torch.equal(
            TokenHybrid(k=k, p=p)(scores).selected, Hybrid(k=k, p=p)(scores).selected
        )


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_equal_blocks_differ_by_one_block_a_row_at_most(share):
    layout = BlockLayout(torch.arange(0, 33 * 16, 16).int(), 16, is_uniform=True)
    score = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    kept = token_prefix(score, layout, layout, torch.tensor([share])).sum(-1)
    assert ((kept - share * 32).abs() < 1).all()
    assert ((kept.sum(-1) - share * 32 * 32).abs() <= 0.5).all()


def test_a_unit_that_is_none_or_has_a_mass_is_refused():
    with pytest.raises(ValueError, match=r"^unit=pairs: allowed is blocks or tokens; "):
        ErrorBudget(unit="pairs")
    policy, k = ErrorBudget(unit="tokens", num_heads=2), torch.tensor([0.2, 0.3])
    for make in (
        lambda: ErrorBudget(unit="tokens", p=0.5, num_heads=2),
        lambda: policy.set_budget(k, torch.tensor([0.0, 0.5])),
    ):
        with pytest.raises(ValueError, match=r"^p=\[.*0\.5\]: allowed is 0 with unit=tokens.*; "):
            make()
    assert policy.k.tolist() == pytest.approx([0.1, 0.1])
    policy.set_budget(k, torch.zeros(2))
