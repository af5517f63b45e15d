"""Codebooks from step to step: warm starts, branches, hit rates, and labels kept by their error."""

import pytest
import torch

from gossamer.kernels.kmeans.op import kmeans
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.codebooks import HostScalar, probe_error
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.layouts.clusters import SemanticClusters, SortedClusters

GRID = TokenGrid(4, 4, 8)
T = torch.ones(1)


def steps(count, drift, seed=0):
    """q, k, v of each step of a sampler: clustered tokens of which a share is drawn anew."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        centers = 2 * torch.randn(2, 1, 2, 8, 16, generator=generator)
        place = torch.randint(0, 8, (GRID.num_tokens,), generator=generator)
        noise = torch.randn(2, 1, 2, GRID.num_tokens, 16, generator=generator)
        return centers[..., place, :] + 0.6 * noise

    now = draw()
    values = torch.randn(1, 2, GRID.num_tokens, 16, generator=generator)
    for _ in range(count):
        yield now[0], now[1], values
        moved = torch.rand(GRID.num_tokens, 1, generator=generator) < drift
        now = torch.where(moved, draw(), now)


def attention(cls=SemanticClusters, keep_until=None, estimator=None):
    layout = cls(num_q=8, num_kv=8, keep_until=keep_until)
    parts = (layout, estimator or ErrorAware(), ErrorBudget(k=0.25), Centroid())
    return SparseAttention(SparseMethod(*parts), num_heads=2)


def walk(sparse, tensors, branch="cond"):
    """Run the steps of one branch; return the error the probe foresees at each."""
    errors = []
    for step, (q, k, v) in enumerate(tensors):
        sparse.reset(branch, is_first=step == 0)
        sparse(q, k, v, GRID, T)
        mask = sparse.mask
        inner = [mask.q_layout.permute(q), mask.kv_layout.permute(k), mask.kv_layout.permute(v)]
        scores = sparse.estimator(*inner, mask.q_layout, mask.kv_layout)
        errors.append(float(probe_error(scores, mask, inner[2])))
    return errors


def test_a_warm_step_goes_on_from_the_codebook_of_the_one_before():
    (q, k, v), (q2, k2, v2) = steps(2, 0.1)
    sparse = attention(estimator=_MapAsMass())
    for step, x in enumerate([(q, k, v), (q2, k2, v2)]):
        sparse.reset("cond", is_first=step == 0)
        sparse(*x, GRID, T)
    cold = sparse.layout.cluster(q, k, GRID, None)
    warm = kmeans(k2, 8, iterations=2, initial=cold.codebook.k)
    assert torch.equal(sparse.codebooks.carried["cond"].codebook.k, warm.centroids)
    same = (warm.labels == cold.codebook.k_labels).float().mean(-1)
    assert torch.equal(sparse.codebooks.hit_rate[1], same)
    assert same.min() > 0.5 and same.max() < 1


class _MapAsMass(MeanPool):
    """The centroid map as score and as mass, which the policy here wants."""

    gives = ("mass",)

    def __call__(self, *arguments):
        scores = super().__call__(*arguments)
        return type(scores)(scores.q_layout, scores.kv_layout, scores.score, mass=scores.score)


def test_without_a_branch_nothing_is_carried():
    (q, k, v), (q2, k2, v2) = steps(2, 0.1)
    sparse, fresh = attention(), attention()
    for x in ((q, k, v), (q2, k2, v2)):
        sparse.reset()
        out = sparse(*x, GRID, T)
    assert sparse.codebooks.carried == {}
    assert torch.equal(out, fresh(q2, k2, v2, GRID, T))


def test_branches_and_runs_do_not_see_each_other():
    run = list(steps(3, 0.1))
    other = list(steps(3, 0.1, seed=1))
    alone, mixed = attention(), attention()
    walk(alone, run)
    for step, (mine, theirs) in enumerate(zip(run, other, strict=True)):
        for branch, tensors in (("cond", mine), ("uncond", theirs)):
            mixed.reset(branch, is_first=step == 0)
            mixed(*tensors, GRID, T)
    a, b = (x.codebooks.carried["cond"].codebook for x in (alone, mixed))
    assert torch.equal(a.k, b.k) and torch.equal(a.q_labels, b.q_labels)
    walk(mixed, run)  # a first step starts cold
    assert torch.equal(mixed.codebooks.carried["cond"].codebook.k, a.k)


def test_a_codebook_of_another_shape_is_not_used():
    (q, k, v) = next(steps(1, 0))
    sparse = attention()
    sparse.reset("cond")
    sparse(q, k, v, GRID, T)
    sparse.reset("cond")
    two = [x.repeat(2, 1, 1, 1) for x in (q, k, v)]
    out = sparse(*two, GRID, T)
    assert torch.equal(out[:1], out[1:])


@pytest.mark.parametrize("cls", [SemanticClusters, SortedClusters])
@pytest.mark.parametrize("count", [4, 8])
def test_few_steps_that_differ_are_clustered_again_and_alike_ones_are_not(cls, count):
    clusterings = {}
    for drift in (0.0, 0.4):
        sparse = attention(cls, keep_until=0.2)
        calls = []
        original = sparse.layout.cluster
        sparse.layout.cluster = lambda *x, original=original, calls=calls: (
            calls.append(1) or original(*x)
        )
        errors = walk(sparse, steps(count, drift))
        clusterings[drift] = len(calls)
        if drift == 0:
            assert max(errors) <= 1.2 * errors[0]
    assert clusterings[0.0] == 1
    # The error that decides is the step's before: of two steps that differ one goes by old labels.
    assert clusterings[0.4] >= count // 2


def test_kept_labels_cost_at_most_what_the_rule_allows_a_step_late():
    tensors = list(steps(8, 0.05))
    kept = walk(attention(keep_until=0.2), tensors)
    never = walk(attention(keep_until=1e9), tensors)
    always = walk(attention(), tensors)
    assert sum(always) <= sum(kept) * 1.05
    assert sum(kept) < sum(never)


def test_an_estimator_without_errors_cannot_decide():
    sparse = attention(keep_until=0.2, estimator=_MapAsMass())
    sparse.reset("cond")
    with pytest.raises(ValueError, match="keep_until"):
        sparse(*next(steps(1, 0)), GRID, T)


def test_a_host_scalar_is_the_number():
    assert HostScalar(torch.tensor(0.25)).read() == 0.25
