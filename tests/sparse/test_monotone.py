"""Monotone policies, in 1,000 random cases each: a larger budget takes nothing away."""

import pytest
import torch

from gossamer.kernels.block_select.op import hybrid_select
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.token_share import TokenHybrid, token_prefix

CASES = 1000  # heads, with scores, block sizes and budgets of their own
FREE = {"guaranteed": 0.0}
NESTED = {
    "hybrid": Hybrid,
    "spargeattention": lambda **x: Hybrid(keep_crossing=False, **x),
    "trained": TrainedHybrid,
    "pairs": TokenHybrid,
    "error of a row": lambda **x: ErrorBudget(**FREE, **x),
    "error of a row, pairs": lambda **x: ErrorBudget(**FREE, unit="tokens", **x),
    "error of a head": lambda **x: ErrorBudget(**FREE, scope="head", **x),
    "error of a head, pairs": lambda **x: ErrorBudget(**FREE, scope="head", unit="tokens", **x),
}
SCOPES = ["row", "head", "layer"]


def cases(seed=0, heads=CASES, rows=3, columns=10):
    """Scores of peaked, flat and tied rows, over blocks of 0 to 8 tokens; each row has some."""
    generator = torch.Generator().manual_seed(seed)

    def layout(count):
        sizes = torch.randint(0, 9, (1, heads, count), generator=generator)
        sizes[..., 0] += 1
        return BlockLayout(torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int(), 9)

    q_layout, kv_layout = layout(rows), layout(columns)
    shape = (1, heads, rows, columns)
    sharpness = 10 ** (3 * torch.rand(1, heads, 1, 1, generator=generator) - 2)
    real = kv_layout.sizes[:, :, None]
    score, mass = (
        (sharpness * torch.randn(shape, generator=generator))
        .masked_fill(real == 0, -torch.inf)
        .softmax(-1)
        for _ in range(2)
    )
    score[:, ::5] = (score[:, ::5] * 8).round() / 8
    error = torch.rand(shape[:-1], generator=generator)
    scores = BlockScores(q_layout, kv_layout, score, mass=mass, error=error)
    budgets = torch.rand(2, heads, generator=generator)
    budgets[:, ::7] = budgets[:, ::7].round()
    less, more = budgets.sort(0)[0]
    return scores, less, more


def chosen(make, scores, k, p=None):
    policy = make(num_heads=len(k))
    policy.set_budget(k, torch.zeros_like(k) if p is None else p)
    return policy(scores).selected


@pytest.mark.parametrize("name", NESTED)
def test_a_mask_lies_within_that_of_a_larger_budget(name):
    scores, less, more = cases()
    small, large = (chosen(NESTED[name], scores, k) for k in (less, more))
    assert small.any(-1).all()
    assert not (small & ~large).any()
    full = chosen(NESTED[name], scores, torch.ones(CASES))
    pairs = scores.q_layout.sizes[..., :, None] * scores.kv_layout.sizes[..., None, :]
    assert (full | (pairs == 0)).all()
    assert (small != large).any((-2, -1)).sum() > CASES / 2
    if name in ("hybrid", "spargeattention", "trained", "pairs"):
        k = torch.full((CASES,), 0.2)
        small, large = (chosen(NESTED[name], scores, k, p) for p in (less, more))
        assert not (small & ~large).any()


@pytest.mark.parametrize("unit", ["blocks", "tokens"])
def test_a_block_is_lost_only_where_another_became_guaranteed(unit):
    """In a few rows, and the lost one had been chosen by error."""
    scores, less, more = cases(seed=1)
    make = lambda **x: ErrorBudget(guaranteed=0.5, unit=unit, **x)  # noqa: E731
    layouts = scores.q_layout, scores.kv_layout

    def sure(k):
        if unit == "tokens":
            return token_prefix(scores.mass, *layouts, k / 2)
        return hybrid_select(scores.mass, k / 2, torch.zeros_like(k))

    small, large = (chosen(make, scores, k) for k in (less, more))
    lost = small & ~large
    is_real = (scores.q_layout.sizes[..., None] > 0) & (scores.kv_layout.sizes[:, :, None] > 0)
    lost &= is_real
    assert 0 < lost.any((-2, -1)).sum() < CASES / 10
    assert not (lost & sure(less)).any()
    assert (sure(more) & ~sure(less))[lost.any(-1)].any(-1).all()


@pytest.mark.parametrize("unit", ["blocks", "tokens"])
@pytest.mark.parametrize("scope", SCOPES)
def test_guaranteed_blocks_are_nested_and_pairs_are_spent_to_one_block(scope, unit):
    """What is left to the error may change with the budget, since other blocks are guaranteed."""
    scores, less, more = cases(seed=1)
    pairs = scores.q_layout.sizes[..., :, None] * scores.kv_layout.sizes[..., None, :]
    largest = pairs.flatten(2).amax(-1) * (3 if scope == "row" else 1)  # a block of each row

    def spent(k):
        make = lambda **x: ErrorBudget(guaranteed=0.5, scope=scope, unit=unit, **x)  # noqa: E731
        mask = chosen(make, scores, k)
        if unit == "blocks":
            sure = hybrid_select(scores.mass, k / 2, torch.zeros_like(k))
            assert (mask | ~sure).all()
        return (mask * pairs).flatten(2).sum(-1)

    small, large = spent(less), spent(more)
    if scope == "layer":
        assert small.sum() <= large.sum() + largest.amax()
    else:
        assert (small <= large + largest).all()


def test_a_layers_mask_lies_within_that_of_a_larger_budget():
    """Heads share the layer's budget: 125 layers of four heads, at eight steps of the budget."""
    for seed in range(125):
        scores, _, _ = cases(seed=seed, heads=4)
        before = None
        for share in torch.linspace(0, 1, 9):
            make = lambda **x: ErrorBudget(**FREE, scope="layer", **x)  # noqa: E731
            now = chosen(make, scores, share.expand(4))
            assert before is None or not (before & ~now).any()
            before = now
