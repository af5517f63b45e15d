import pytest
import torch

from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.token_share import TokenHybrid


def scores(score, q_tokens=None, kv_tokens=None):
    *_, rows, columns = score.shape
    q_layout = RowMajor(q_block=4, kv_block=4).build(TokenGrid(1, 1, 4 * rows))[0]
    kv_layout = RowMajor(q_block=4, kv_block=4).build(TokenGrid(1, 1, 4 * columns))[1]
    return BlockScores(q_layout, kv_layout, score)


def random_scores(seed, rows=5, columns=12):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, rows, columns, generator=generator)
    return scores(logits.softmax(-1))


def kept(policy, found):
    return policy(found).selected.sum(-1)


def test_top_p_keeps_the_block_that_crosses_the_mass():
    found = scores(torch.tensor([[[[0.2, 0.5, 0.3]]]]))
    assert Hybrid(k=0, p=0.5)(found).selected.tolist() == [[[[False, True, False]]]]
    assert Hybrid(k=0, p=0.51)(found).selected.tolist() == [[[[False, True, True]]]]


def test_the_union_is_the_longer_prefix():
    found = random_scores(0)
    top_k, top_p = Hybrid(k=0.3, p=0)(found).selected, Hybrid(k=0, p=0.6)(found).selected
    assert torch.equal(Hybrid(k=0.3, p=0.6)(found).selected, top_k | top_p)


def test_at_least_one_block_a_row_is_kept():
    assert (kept(Hybrid(k=0, p=0), random_scores(1)) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_of_one_keeps_every_block_whatever_the_rounding(dtype):
    found = random_scores(2)
    rounded = BlockScores(found.q_layout, found.kv_layout, found.score.to(dtype))
    assert Hybrid(k=0, p=1)(rounded).selected.all()


def test_the_mask_grows_with_k_and_with_p():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        (k, p), (more_k, more_p) = torch.rand(2, 2, generator=generator).sort(0)[0].tolist()
        found = random_scores(seed)
        small, large = Hybrid(k=k, p=p)(found).selected, Hybrid(k=more_k, p=more_p)(found).selected
        assert not (small & ~large).any()


def many_rows(columns=24):
    """Scores of 1,000 heads with a row each: peaked, flat, with ties, with zeros, constant."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, 1000, 1, columns, generator=generator)
    scale = 10 ** (3 * torch.rand(1, 1000, 1, 1, generator=generator) - 2)
    score = (scale * logits).softmax(-1)
    score[:, :200] = (score[:, :200] * 8).round() / 8
    score[:, 200:250] = 1 / columns
    score[:, 250:300] = 0
    budgets = torch.rand(4, 1000, generator=generator)
    budgets[:, 300:350] = budgets[:, 300:350].round()
    k, more_k = budgets[:2].sort(0)[0]
    p, more_p = budgets[2:].sort(0)[0]
    return scores(score), (k, p), (more_k, more_p)


def of_budget(k, p, keep_crossing):
    policy = Hybrid(keep_crossing=keep_crossing).for_heads(1000)
    policy.set_budget(k, p)
    return policy


@pytest.mark.parametrize("keep_crossing", [True, False])
def test_in_a_thousand_cases_the_mask_grows_with_either_budget(keep_crossing):
    found, (k, p), (more_k, more_p) = many_rows()
    small = of_budget(k, p, keep_crossing)(found).selected
    assert small.any(-1).all()
    for larger in ((more_k, p), (k, more_p), (more_k, more_p)):
        large = of_budget(*larger, keep_crossing)(found).selected
        assert not (small & ~large).any()
    ones = torch.ones(1000)
    assert of_budget(ones, p, keep_crossing)(found).selected.all()
    assert of_budget(k, ones, keep_crossing)(found).selected.all()


@pytest.mark.parametrize("keep_crossing", [True, False])
def test_in_a_thousand_cases_a_row_is_a_prefix_of_its_order_that_fits_its_budget(keep_crossing):
    found, (k, p), _ = many_rows()
    selected = of_budget(k, p, keep_crossing)(found).selected[0, :, 0]
    for score, kept, head_k, head_p in zip(found.score[0, :, 0], selected, k, p, strict=True):
        ranked = score.argsort(descending=True, stable=True)
        count = int(kept.sum())
        assert kept[ranked[:count]].all()
        least = min(24, max(1, round(24 * float(head_k))))
        mass = score[ranked].double().cumsum(0)
        if head_p >= 1:
            expected = [24]
        else:  # fp32 cannot tell a mass from p within 1e-6
            expected = []
            for slack in (-1e-6, 1e-6):
                inside = (mass - score[ranked] < float(head_p) + slack).sum()
                if not keep_crossing:
                    inside = min(inside, (mass <= float(head_p) + slack).sum())
                expected.append(max(least, int(inside)))
        assert min(expected) <= count <= max(expected)


def test_the_crossing_block_is_left_out_in_spargeattentions_convention():
    found = scores(torch.tensor([[[[0.25, 0.5, 0.125, 0.125]]]]))

    def chosen(p, k=0.0):
        return Hybrid(k=k, p=p, keep_crossing=False)(found).selected.flatten().tolist()

    assert chosen(0.4) == [False, True, False, False]  # one is always kept
    assert chosen(0.74) == [False, True, False, False]
    assert chosen(0.75) == [True, True, False, False]
    assert chosen(0.74, k=0.5) == [True, True, False, False]
    assert chosen(1.0) == [True] * 4
    assert Hybrid(k=0, p=0.74)(found).selected.flatten().tolist() == [True, True, False, False]


def test_the_convention_stays_with_the_heads_copy():
    assert Hybrid(keep_crossing=False).for_heads(2).keep_crossing is False


def test_forced_blocks_are_kept_beside_the_budget():
    found = random_scores(4)
    forced = torch.zeros_like(found.score, dtype=torch.bool)
    forced[:, :, 1], forced[..., 3] = True, True
    with_forced = BlockScores(found.q_layout, found.kv_layout, found.score, forced)
    for k, p in ((0.25, 0.0), (0.0, 0.5), (1.0, 0.0)):
        policy = Hybrid(k=k, p=p)
        assert torch.equal(policy(with_forced).selected, policy(found).selected | forced)


def test_ties_go_to_the_lower_block():
    found = scores(torch.full((1, 1, 1, 6), 1 / 6))
    assert Hybrid(k=0.5, p=0)(found).selected.tolist() == [[[[True] * 3 + [False] * 3]]]


def test_each_head_has_its_own_budget():
    policy = Hybrid().for_heads(3)
    policy.set_budget(torch.tensor([0.25, 0.5, 1.0]), torch.zeros(3))
    assert kept(policy, random_scores(3))[0, :, 0].tolist() == [3, 6, 12]


@pytest.mark.parametrize("made", [Hybrid, TrainedHybrid, TokenHybrid, ErrorBudget])
def test_budgets_given_for_each_head_are_those_of_every_layer(made):
    policy = made(num_heads=3)
    k, p = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 0.5, 0.6])
    policy.set_budget(k, p)
    layers = [policy.for_heads(3) for _ in range(2)]
    layers[0].set_budget(k / 2, p / 2)
    assert torch.equal(layers[1].k, k) and torch.equal(layers[1].p, p)
    assert torch.equal(made(k=0.4).for_heads(3).k, torch.full((3,), 0.4))
    with pytest.raises(ValueError, match=r"^k\w*=\[0.*allowed is one .* each of the 2 heads"):
        policy.for_heads(2)


def test_limits_and_orders_given_for_each_head_are_kept_as_well():
    drop, layout = FilteredDrop(num_heads=2), PerHead(num_heads=2)
    drop.set_limit(torch.tensor([-3.0, -7.0]))
    layout.set_choice(torch.tensor([1, 3]))
    assert drop.for_heads(2).skip_below.tolist() == [-3.0, -7.0]
    assert layout.for_heads(2).choice.tolist() == [1, 3]
    for part, name in ((drop, "skip_below"), (layout, "choice")):
        with pytest.raises(ValueError, match=rf"^{name}=.*allowed is one number for all heads"):
            part.for_heads(5)


def test_a_cast_of_the_model_leaves_the_budgets_alone():
    policy = Hybrid(k=0.1234567, p=0.7654321)
    cast = torch.nn.Sequential(policy, torch.nn.Linear(2, 2)).to(torch.bfloat16)
    assert cast[1].weight.dtype == torch.bfloat16
    assert cast[0].k.tolist() == Hybrid(k=0.1234567).k.tolist()
    assert cast[0].p.dtype == torch.float32


@pytest.mark.parametrize("k, p", [(-0.1, 0), (1.1, 0), (0, -0.1), (0, 2), (float("nan"), 0)])
def test_a_share_outside_zero_to_one_is_refused(k, p):
    with pytest.raises(ValueError, match="allowed is a share from 0 to 1"):
        Hybrid(k=k, p=p)


def test_density_counts_real_token_pairs_of_ragged_blocks():
    q_layout, kv_layout = RowMajor(q_block=4, kv_block=3).build(TokenGrid(1, 1, 10))
    generator = torch.Generator().manual_seed(0)
    selected = torch.rand(2, 3, 3, 4, generator=generator) < 0.4
    mask = BlockMask(q_layout, kv_layout, selected)
    for b in range(2):
        for h in range(3):
            pairs = sum(bool(selected[b, h, i // 4, j // 3]) for i in range(10) for j in range(10))
            assert mask.density[b, h].item() == pytest.approx(pairs / 100)


def test_text_rows_and_columns_are_always_selected():
    from gossamer.sparse.layout import Tiles

    layout = Tiles(block=(1, 2, 2)).build(TokenGrid(1, 4, 4, text_after=4))[0]
    mask = keep_text(BlockMask(layout, layout, torch.zeros(1, 1, 5, 5, dtype=torch.bool)))
    assert mask.selected[0, 0, 4].all() and mask.selected[0, 0, :, 4].all()
    assert mask.selected.sum() == 9
