import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.tuning import Captured, tune

GRID = TokenGrid(4, 8, 8)


def captured(seed, sharpness=(1.0, 3.0)):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, len(sharpness), GRID.num_tokens, 8)
    step, v = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.tensor(sharpness)[None, :, None, None]
    walk = step.cumsum(2) / 4
    return Captured(scale * walk, walk, v, GRID)


def attention(compensation=None, **policy):
    layout = RowMajor(q_block=16, kv_block=16)
    method = SparseMethod(
        layout, MeanPool(), Hybrid(**{"k": 0.0, **policy}), compensation or Drop()
    )
    return SparseAttention(method, 2)


def error(given, p, limit=None, compensation=None, **policy):
    part = attention(compensation, **policy)
    part.policy.set_budget(part.policy.k, p)
    if limit is not None:
        part.compensation.set_limit(limit)
    out = part(given.q, given.k, given.v, given.grid, torch.ones(1))
    dense = F.scaled_dot_product_attention(given.q, given.k, given.v)
    return (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3)), part.mask


def test_the_least_mass_within_the_bound_is_found_for_each_head():
    given = captured(0)
    found = tune(attention(), [given], l1=0.1, l2=0.1)
    within, mask = error(given, found.p)
    assert found.skip_below is None and (within <= 0.1).all()
    torch.testing.assert_close(found.error, within)
    torch.testing.assert_close(found.density, mask.density[0].float())
    beyond = error(given, (found.p - 2 / 1024).clamp(min=0))[0]
    assert ((beyond > 0.1) | (found.p < 2 / 1024)).all()
    assert found.p[0] != found.p[1]


def test_the_worst_input_decides():
    inputs = [captured(seed) for seed in range(3)]
    single = torch.stack([tune(attention(), [x], l1=0.1, l2=0.1).p for x in inputs])
    assert torch.equal(tune(attention(), inputs, l1=0.1, l2=0.1).p, single.amax(0))


@pytest.mark.parametrize("policy", [{}, {"keep_crossing": False}, {"k": 0.25}])
def test_the_second_filter_is_tuned_after_the_mass(policy):
    inputs = [captured(0), captured(1)]
    found = tune(attention(FilteredDrop(), **policy), inputs, l1=0.05, l2=0.1)
    assert torch.equal(found.p, tune(attention(Drop(), **policy), inputs, l1=0.05, l2=0.1).p)
    errors = [error(x, found.p, found.skip_below, FilteredDrop(), **policy)[0] for x in inputs]
    torch.testing.assert_close(found.error, torch.stack(errors).amax(0))
    assert (found.error <= 0.1 + 1e-6).all() and (found.skip_below > -50).any()


def test_no_error_allowed_means_dense_heads():
    found = tune(attention(), [captured(0)], l1=0.0, l2=0.0)
    assert (found.density > 0.9).all() and (found.error < 1e-5).all()


def test_the_same_inputs_give_the_same_budgets_and_the_attention_stays_as_it_is():
    given, part = [captured(3)], attention(FilteredDrop(skip_below=-7.0), p=0.3)
    before = {name: x.clone() for name, x in part.state_dict().items()}
    first, second = tune(part, given), tune(part, given)
    assert torch.equal(first.p, second.p) and torch.equal(first.skip_below, second.skip_below)
    assert all(torch.equal(before[name], x) for name, x in part.state_dict().items())


def test_compensation_needs_less_mass():
    given = [captured(0)]
    dropped, kept = (tune(attention(c), given, l1=0.1, l2=0.1).p for c in (Drop(), Centroid()))
    assert (kept <= dropped).all() and (kept < dropped).any()


def test_filtered_drop_refuses_training_and_a_limit_above_zero():
    given = captured(0)
    part = attention(FilteredDrop())
    with pytest.raises(ValueError, match="filtered_drop: allowed is inference"):
        part(given.q.requires_grad_(), given.k, given.v, GRID, torch.ones(1))
    with pytest.raises(ValueError, match=r"skip_below=.*allowed is at most 0"):
        FilteredDrop(skip_below=1.0)
    assert part.state_dict()["compensation.skip_below"].tolist() == [-10.0, -10.0]


@pytest.mark.parametrize(
    ("inputs", "bounds", "said"),
    [([], (0.05, 0.06), "inputs="), ([captured(0)], (0.06, 0.05), "l1=0.06, l2=0.05")],
)
def test_wrong_arguments_are_refused(inputs, bounds, said):
    with pytest.raises(ValueError, match=said):
        tune(attention(), inputs, l1=bounds[0], l2=bounds[1])
