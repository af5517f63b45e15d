"""Error-aware scores, the budget they spend, and the bound beside them."""

import itertools

import pytest
import torch

from gossamer.kernels.block_select.op import hybrid_select
from gossamer.sparse.bound import map_error
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import BlockLayout, RowMajor, TokenGrid
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(3, 4, 6)


def qkv(seed=0, tokens=72, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def in_clusters(seed=0):
    q, k, v = qkv(seed)
    q_layout, kv_layout = SemanticClusters(num_q=5, num_kv=11)(q, k, v, GRID)
    inner = q_layout.permute(q), kv_layout.permute(k), kv_layout.permute(v)
    return inner, q_layout, kv_layout


def random_scores(seed, heads=2, rows=5, columns=9):
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.randint(0, 9, (n,), generator=generator) for n in (rows, columns)]
    q_layout, kv_layout = (
        BlockLayout(torch.cat([torch.zeros(1), x.cumsum(0)]).int(), 9) for x in sizes
    )
    score, mass = torch.rand(2, 1, heads, rows, columns, generator=generator).pow(4)
    score, mass = (x / x.sum(-1, keepdim=True) for x in (score, mass))
    error = torch.rand(1, heads, rows, generator=generator)
    return BlockScores(q_layout, kv_layout, score, mass=mass, error=error)


@pytest.mark.parametrize("kind", ["output", "keys"])
def test_scores_share_out_the_error_of_each_row(kind):
    inner, q_layout, kv_layout = in_clusters()
    scores = ErrorAware(kind=kind)(*inner, q_layout, kv_layout)
    torch.testing.assert_close(scores.score.sum(-1), torch.ones_like(scores.score[..., 0]))
    torch.testing.assert_close(scores.mass.sum(-1), torch.ones_like(scores.mass[..., 0]))
    assert (scores.error is None) == (kind == "keys")


def test_the_error_is_the_change_of_the_mean_querys_output():
    """For one unselected block the probe is exact but for the normaliser and the center."""
    inner, q_layout, kv_layout = in_clusters()
    _, k, v = inner
    scores = ErrorAware()(*inner, q_layout, kv_layout)
    offsets = kv_layout.offsets[0]
    for h in range(2):
        rows = [
            inner[0][0, h, a:b].mean(0)
            for a, b in itertools.pairwise(q_layout.offsets[0, h].tolist())
        ]
        for a, query in enumerate(rows):
            logits = k[0, h] @ query / 4
            exact = logits.softmax(0) @ v[0, h]
            for c, (start, end) in enumerate(itertools.pairwise(offsets[h].tolist())):
                if end - start < 2:
                    continue
                weight = logits.exp()
                moved_k, moved_v = k[0, h, start:end].mean(0), v[0, h, start:end].mean(0)
                stands = (end - start) * (moved_k @ query / 4).exp()
                rest = weight.clone()
                rest[start:end] = 0
                out = (rest @ v[0, h] + stands * moved_v) / (rest.sum() + stands)
                truth = (out - exact).square().sum()
                found = scores.score[0, h, a, c] * scores.error[0, h, a]
                assert 0.5 * truth - 1e-6 < found < 2 * truth + 1e-6


def test_rows_without_any_error_go_by_mass():
    q, k, v = qkv(tokens=8)
    one_each = RowMajor(q_block=4, kv_block=1).build(TokenGrid(1, 2, 4))
    scores = ErrorAware()(q, k, v, *one_each)
    assert scores.score.isfinite().all() and scores.error.isfinite().all()
    torch.testing.assert_close(scores.score.sum(-1), torch.ones(1, 2, 2))


@pytest.mark.parametrize("scope", ["row", "head", "layer"])
def test_the_budget_is_that_of_the_hybrid_set_and_is_passed_by_one_block_at_most(scope):
    for seed in range(100):
        scores = random_scores(seed)
        policy = ErrorBudget(k=0.3, p=0.4, scope=scope, num_heads=2)
        chosen = policy(scores).selected
        planned = hybrid_select(scores.mass, policy.k, policy.p)
        sure = hybrid_select(scores.mass, policy.k * 0.5, torch.zeros(2))
        assert (chosen | ~sure).all()
        cost = scores.q_layout.sizes[:, None] * scores.kv_layout.sizes
        first = {"row": 3, "head": 2, "layer": 1}[scope]
        spent, allowed = ((x * cost).flatten(first).sum(-1) for x in (chosen, planned))
        largest = (cost * (chosen & ~sure)).flatten(first).amax(-1)
        assert (spent < allowed + largest.clamp(min=1)).all()
        left = (cost * ~chosen).flatten(first).sum(-1)
        assert ((spent >= allowed) | (left == 0)).all()


@pytest.mark.parametrize("scope", ["row", "head", "layer"])
def test_the_blocks_of_most_error_per_pair_are_taken(scope):
    scores = random_scores(3)
    policy = ErrorBudget(k=0.4, guaranteed=0.0, scope=scope, num_heads=2)
    chosen = policy(scores).selected
    sure = hybrid_select(scores.mass, torch.zeros(2), torch.zeros(2))
    size = scores.kv_layout.sizes.clamp(min=1)
    gain = scores.score / size * (1 if scope == "row" else scores.error[..., None])
    free = ~sure & (scores.kv_layout.sizes > 0) & (scores.q_layout.sizes > 0)[:, None]
    first = {"row": 3, "head": 2, "layer": 1}[scope]
    taken = gain.masked_fill(~(chosen & free), torch.inf).flatten(first).amin(-1)
    left = gain.masked_fill(chosen | ~free, -1).flatten(first).amax(-1)
    assert (taken >= left).all()


@pytest.mark.parametrize("scope", ["row", "head", "layer"])
def test_a_larger_budget_keeps_what_a_smaller_one_chose(scope):
    for seed in range(50):
        scores = random_scores(seed)
        budgets = [0.0, 0.2, 0.5, 0.8, 1.0]
        masks = [ErrorBudget(k=k, guaranteed=0.0, scope=scope)(scores).selected for k in budgets]
        for small, large in itertools.pairwise(masks):
            assert (large | ~small).all()
        full = (scores.q_layout.sizes[:, None] * scores.kv_layout.sizes) > 0
        assert (masks[-1] | ~full).all()


def test_budgets_beyond_a_row_need_comparable_errors():
    inner, q_layout, kv_layout = in_clusters()
    released = ErrorAware(kind="keys")(*inner, q_layout, kv_layout)
    assert ErrorBudget(k=0.3)(released).selected.any()
    for scores in (released, MeanPool()(*inner, q_layout, kv_layout)):
        with pytest.raises(ValueError, match="estimator=error_aware with kind=output"):
            ErrorBudget(scope="layer")(scores)


@pytest.mark.parametrize("arguments", [{"scope": "block"}, {"guaranteed": 1.5}, {"k": 2.0}])
def test_bad_budgets_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ErrorBudget(**arguments)


def test_a_policy_of_each_head_keeps_its_settings():
    policy = ErrorBudget(k=0.2, p=0.3, guaranteed=0.25, scope="head").for_heads(4)
    assert policy.k.shape == (4,) and (policy.guaranteed, policy.scope) == (0.25, "head")


def test_the_bound_holds_and_its_error_is_that_of_the_map():
    for seed in range(5):
        (q, k, v), q_layout, kv_layout = in_clusters(seed)
        scores = MeanPool()(q, k, v, q_layout, kv_layout)
        mask = Hybrid(k=0.3)(scores)
        found = map_error(q, k, mask)
        assert (found.error <= found.bound).all() and (found.probe > 0).all()
    filled = q.new_zeros(2, 72, 72)
    for h in range(2):
        row, column = (
            torch.arange(x.num_blocks).repeat_interleave(x.sizes[0, h])
            for x in (q_layout, kv_layout)
        )
        means = torch.stack([k[0, h, column == c].mean(0) for c in column])
        allowed = mask.selected[0, h][row][:, column]
        filled[h] = torch.where(allowed, q[0, h] @ k[0, h].T, q[0, h] @ means.T) / 4
    truth = (filled.softmax(-1) - (q[0] @ k[0].transpose(1, 2) / 4).softmax(-1)).square()
    torch.testing.assert_close(found.error[0], truth.mean((1, 2)))


def test_a_few_blocks_stand_for_all_in_the_bound():
    (q, k, v), q_layout, kv_layout = in_clusters()
    mask = Hybrid(k=0.3)(MeanPool()(q, k, v, q_layout, kv_layout))
    whole, few = map_error(q, k, mask), map_error(q, k, mask, q_blocks=2)
    assert (few.error <= few.bound).all() and not torch.equal(few.error, whole.error)
    every = map_error(q, k, mask, q_blocks=72)
    for name in ("error", "probe", "spread"):
        torch.testing.assert_close(getattr(every, name), getattr(whole, name))
    one = mask.of_first(1)
    assert torch.equal(one.selected, mask.selected[:1])


def test_a_full_mask_has_no_map_error():
    (q, k, _), q_layout, kv_layout = in_clusters()
    everything = torch.ones(1, 2, 5, 11, dtype=torch.bool)
    found = map_error(q, k, BlockMask(q_layout, kv_layout, everything))
    assert (found.error == 0).all() and (found.probe == 0).all() and (found.spread > 0).all()
