"""Trainable masks start exactly at the untrained mask, and their gradients are what they claim."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop, GatedCentroid, Linear
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.router import Router
from gossamer.sparse.gates import find_band
from gossamer.sparse.layout import BlockLayout, RowMajor, Tiles, TokenGrid
from gossamer.sparse.linear_branch import linear_complement
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.token_share import TokenHybrid

GRID, HEADS, DIM = TokenGrid(3, 4, 5), 3, 8
T = torch.ones(2)
LAYOUTS = {"ragged rows": RowMajor(q_block=8, kv_block=7), "tiles": Tiles(block=(2, 2, 2))}
UNTRAINED = {"estimator": MeanPool(), "policy": Hybrid(k=0.3, p=0.55), "compensation": Centroid()}
TRAINED = {
    "budgets": {"policy": TrainedHybrid(k=0.3, p=0.55)},
    "router": {"estimator": Router(temperature=1.0, side=3)},
    "gate": {"compensation": GatedCentroid()},
    "linear": {"compensation": Linear()},
    "all": {
        "policy": TrainedHybrid(k=0.3, p=0.55),
        "estimator": Router(temperature=1.0, side=3),
        "compensation": GatedCentroid(),
    },
    "linear with budgets": {"policy": TrainedHybrid(k=0.3, p=0.55), "compensation": Linear()},
}


def qkv(seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, GRID.num_tokens, DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def attention(layout: Any = LAYOUTS["tiles"], **parts: Any) -> SparseAttention:
    method = SparseMethod(layout=layout, **{**UNTRAINED, **parts})
    return SparseAttention(method, HEADS, DIM)


def in_double(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.double()
    return module


def in_float(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_untrained_mask_bit_for_bit(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    start = Drop() if "linear" in name else Centroid()
    x = qkv(dtype=dtype)
    untrained = attention(LAYOUTS[layout], compensation=start)
    trained = attention(LAYOUTS[layout], **TRAINED[name])
    expected = untrained(*x, GRID, T)
    with torch.no_grad():
        assert torch.equal(trained(*x, GRID, T), expected)
        assert trained.band is None or trained.training
    trained.reset()
    out = trained(*x, GRID, T)
    assert torch.equal(out, expected) and out.requires_grad
    assert torch.equal(trained.mask.selected, untrained.mask.selected)


@pytest.mark.parametrize("name", TRAINED)
def test_every_mask_parameter_gets_a_gradient_in_every_step(name: str) -> None:
    trained = attention(**TRAINED[name])
    x = [t.requires_grad_() for t in qkv(dtype=torch.float32)]
    (trained(*x, GRID, T) * qkv(1, torch.float32)[0]).sum().backward()
    grads = {name: p.grad for name, p in trained.named_parameters()}
    assert grads and all(g is not None and g.isfinite().all() for g in grads.values())
    moved = {name for name, g in grads.items() if g.abs().max() > 0}
    assert moved == set(grads)


@pytest.mark.parametrize("name", TRAINED)
def test_a_recompute_gives_the_same_gradients(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for recompute in (None, False, True):
        trained = attention(**TRAINED[name])
        x = [t.requires_grad_() for t in qkv(dtype=torch.float32)]
        if recompute is None:
            out = trained(*x, GRID, T)
        else:
            out = checkpoint(trained, *x, GRID, T, use_reentrant=recompute)
        (out * qkv(1, torch.float32)[0]).sum().backward()
        found.append([t.grad for t in [*x, *trained.parameters()]])
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_cast_of_the_model_leaves_mask_parameters_in_fp32(name: str) -> None:
    trained = attention(**TRAINED[name])
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    before = copy.deepcopy(trained.state_dict())
    nn.Sequential(trained, nn.Linear(2, 2)).to(torch.bfloat16)
    after = trained.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


def test_layers_own_their_parameters_and_share_what_has_none() -> None:
    estimator, policy = Router(), TrainedHybrid()
    method = SparseMethod(LAYOUTS["tiles"], estimator, policy, GatedCentroid())
    first, second = (SparseAttention(method, HEADS, DIM) for _ in range(2))
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared and len(list(first.parameters())) == 5
    plain = attention()
    assert plain.estimator is UNTRAINED["estimator"] and not list(plain.parameters())
    assert set(plain.state_dict()) == {"policy.k", "policy.p"}


def test_without_a_head_dim_a_router_is_mean_pool_and_linear_is_drop() -> None:
    x = qkv(dtype=torch.float32)
    method = SparseMethod(LAYOUTS["tiles"], Router(), Hybrid(k=0.3, p=0.55), Linear())
    out = SparseAttention(method, HEADS)(*x, GRID, T)
    assert torch.equal(out, attention(compensation=Drop())(*x, GRID, T))


# Budgets


def banded(score: Tensor, policy: TrainedHybrid, kv_block: int = 4) -> tuple[Any, BlockMask]:
    rows, columns = score.shape[2:]
    q_layout = RowMajor(q_block=4, kv_block=4).build(TokenGrid(1, 1, 4 * rows))[0]
    tokens = TokenGrid(1, 1, kv_block * columns - 1)  # the last block is shorter
    kv_layout = RowMajor(q_block=4, kv_block=kv_block).build(tokens)[1]
    scores = BlockScores(q_layout, kv_layout, score)
    mask = policy(scores)
    return find_band(scores, mask, policy.side), mask


def random_score(seed: int = 0, rows: int = 5, columns: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, HEADS, rows, columns, generator=generator)).softmax(-1)


def policy_of(k: list[float], p: list[float]) -> TrainedHybrid:
    policy = TrainedHybrid().for_heads(len(k))
    policy.set_budget(torch.tensor(k), torch.tensor(p))
    return policy


def test_the_band_lies_on_both_sides_of_the_threshold() -> None:
    score, policy = random_score(), TrainedHybrid(k=0.4).for_heads(HEADS)
    policy.side = 3
    band = banded(score, policy)[0]
    order = score.argsort(-1, descending=True)
    assert torch.equal(band.count, torch.full_like(band.count, 5))
    assert torch.equal(band.column[..., :3], order[..., [4, 3, 2]])
    assert torch.equal(band.column[..., 3:], order[..., [5, 6, 7]])
    assert torch.equal(band.score, score.gather(-1, band.column)) and band.valid.all()
    sizes = torch.tensor([4] * 11 + [3])
    torch.testing.assert_close(band.area, 4 / 20 * sizes[band.column] / 47)


def test_text_blocks_and_missing_neighbours_are_not_valid() -> None:
    layout = RowMajor(q_block=4, kv_block=4).build(TokenGrid(1, 4, 4, text_after=4))[0]
    score = torch.tensor([0.3, 0.15, 0.25, 0.1, 0.2]).expand(1, 1, 5, 5)
    scores = BlockScores(layout, layout, score)
    band = find_band(scores, Hybrid(k=0.4)(scores), 1)
    assert band.column[0, 0, 0].tolist() == [2, 4]  # block 4 is text
    assert band.valid[0, 0].tolist() == [[True, False]] * 4 + [[False, False]]
    everything = find_band(scores, Hybrid(k=1.0)(scores), 1)
    assert everything.valid[0, 0, 0].tolist() == [True, False]


def test_forced_blocks_are_beside_the_budget() -> None:
    layout = RowMajor(q_block=4, kv_block=4).build(TokenGrid(1, 1, 20))[0]
    score = torch.tensor([0.3, 0.15, 0.25, 0.1, 0.2]).expand(1, 1, 5, 5)
    forced = torch.zeros_like(score, dtype=torch.bool)
    forced[..., 3], forced[0, 0, 1, 2] = True, True  # one beyond the budget, in a row one within
    scores = BlockScores(layout, layout, score, forced)
    band = find_band(scores, Hybrid(k=0.4)(scores), 1)
    assert band.column[0, 0].tolist() == [[2, 4], [0, 4], [2, 4], [2, 4], [2, 4]]
    assert band.valid.all() and band.count[0, 0].tolist() == [2, 1, 2, 2, 2]


def test_heads_with_blocks_of_their_own_are_as_each_alone() -> None:
    """Clusters: offsets [B, H, N + 1]."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.stack([torch.randperm(59, generator=generator)[:7] + 1 for _ in range(6)])
    ends = torch.tensor([[0, 60]]).expand(6, 2)
    offsets = torch.cat([ends, cuts], 1).sort(1)[0].view(2, HEADS, 9).int()
    x = [t.requires_grad_() for t in qkv()]
    parts = TRAINED["linear with budgets"] | {"estimator": Router(temperature=1.0, side=2)}

    class Cuts:
        block_shape = (60, 60)

        def __init__(self, offsets: Tensor) -> None:
            self.offsets = offsets

        def __call__(self, *_: Any) -> tuple[BlockLayout, BlockLayout]:
            q_offsets = torch.arange(0, 61, 10).int()
            return BlockLayout(q_offsets, 10), BlockLayout(self.offsets, 60)

    def gradients(offsets: Tensor, b: slice, h: slice) -> tuple[Tensor, Tensor, Tensor]:
        method = SparseMethod(layout=Cuts(offsets), **{**UNTRAINED, **parts})
        heads = len(range(*h.indices(HEADS)))
        trained = in_double(SparseAttention(method, heads, DIM))
        in_float(trained.policy)
        nn.init.eye_(trained.compensation.projection)
        out = trained(*(t[b, h] for t in x), GRID, T)
        (out * qkv(1)[0][b, h]).sum().backward()
        k_shift, q_change = trained.policy.k_shift.grad, trained.estimator.q_change.grad
        p_shift = trained.policy.p_shift.grad
        return out, torch.stack([k_shift, p_shift]), q_change

    everything = slice(None)
    out, budgets, change = gradients(offsets, everything, everything)
    for h in range(HEADS):
        alone = [gradients(offsets[b, h], slice(b, b + 1), slice(h, h + 1)) for b in range(2)]
        torch.testing.assert_close(out[:, h : h + 1], torch.cat([a[0] for a in alone]))
        torch.testing.assert_close(budgets[:, h : h + 1], alone[0][1] + alone[1][1])
        expected = alone[0][2] + alone[1][2]
        torch.testing.assert_close(change[h : h + 1], expected, rtol=1e-5, atol=1e-7)


def test_shifts_move_the_odds_and_leave_shares_of_zero_and_one() -> None:
    policy = policy_of([0.0, 0.2, 1.0], [0.3, 0.0, 1.0])
    with torch.no_grad():
        policy.k_shift.fill_(0.7)
        policy.p_shift.fill_(-0.4)
    k, p = policy.budget()
    odds = torch.tensor(0.2).logit()
    torch.testing.assert_close(k, torch.tensor([0.0, float((odds + 0.7).sigmoid()), 1.0]))
    odds = torch.tensor(0.3).logit()
    torch.testing.assert_close(p, torch.tensor([float((odds - 0.4).sigmoid()), 0.0, 1.0]))


def test_budgets_get_the_chain_rule_of_the_union() -> None:
    score = random_score(1)
    policy = policy_of([0.25, 0.1, 0.1], [0.0, 0.5, 0.9])
    band, mask = banded(score, policy)
    incoming = torch.randn(band.column.shape, generator=torch.Generator().manual_seed(3))
    gate = policy.gate(score, score, band, mask)
    assert gate.abs().max() == 0
    k_grad, p_grad = torch.autograd.grad((gate * incoming).sum(), [policy.k_shift, policy.p_shift])
    ordered = score.sort(-1, descending=True)[0]
    k, p = (share.detach() for share in policy.budget())
    by_hand = torch.zeros(2, HEADS)
    both = set()
    for b, h, a in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(5)):
        r = int(mask.selected[b, h, a].sum())
        sides = [incoming[b, h, a, 0]] * (r > 1) + [incoming[b, h, a, 1]] * (r < 12)
        slope = torch.stack(sides).mean()
        if r <= max(1, round(float(k[h]) * 12)):
            by_hand[0, h] += slope * 12 * k[h] * (1 - k[h])
        else:
            both.add(int(h))
            threshold = max(float(ordered[b, h, a, r - 1]), 0.1 * float(p[h]) / r)
            by_hand[1, h] += slope / threshold * p[h] * (1 - p[h])
    torch.testing.assert_close(torch.stack([k_grad, p_grad]), by_hand, rtol=1e-5, atol=1e-7)
    assert both == {1, 2} and p_grad[0] == 0


def test_rows_of_one_and_of_all_blocks_get_one_sided_gradients() -> None:
    policy = policy_of([0.01, 1.0, 0.98], [0.0, 0.0, 0.0])
    band, mask = banded(random_score(), policy)
    gate = policy.gate(band.score, band.score, band, mask)
    slopes = torch.zeros(HEADS, 2)
    for side in range(2):
        grad = torch.autograd.grad(gate[..., side].sum(), policy.k_shift, retain_graph=True)[0]
        slopes[:, side] = grad / (2 * 5 * 12)
    expected = torch.tensor([[0, 0.01 * 0.99], [0, 0], [0.98 * 0.02, 0]])
    torch.testing.assert_close(slopes, expected)


def test_the_slope_of_the_density_predicts_counted_masks() -> None:
    """Over many blocks and a wide step, where the rounding to whole blocks averages out."""
    score = random_score(2, rows=100, columns=600)
    policy = policy_of([0.2, 0.05, 0.1], [0.0, 0.6, 0.4])
    band, mask = banded(score, policy)
    slope = policy.density_slope(band, mask)
    step = 0.1
    for which, shift in enumerate((policy.k_shift, policy.p_shift)):
        density = []
        for sign in (1, -1):
            with torch.no_grad():
                shift.fill_(sign * step)
                density.append(banded(score, policy)[1].density.mean(0).float())
                shift.zero_()
        measured = (density[0] - density[1]) / (2 * step)
        torch.testing.assert_close(slope[which], measured, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("compensation", [Drop(), Centroid(), GatedCentroid(), Linear()])
def test_the_gates_of_all_compensations_follow_blended_attention(compensation: Any) -> None:
    """Chain rule through SparseAttention against finite differences of blended attention."""
    layout = LAYOUTS["ragged rows"]
    trained = attention(layout, policy=policy_of([0.3] * 3, [0.0] * 3), compensation=compensation)
    for parameter in (
        trained.compensation.parameters() if isinstance(compensation, nn.Module) else ()
    ):
        nn.init.normal_(parameter, std=0.3)
    if isinstance(compensation, nn.Module):
        in_double(trained.compensation)
    q, k, v = qkv()
    g = qkv(1)[0]
    loss = (trained(q, k, v, GRID, T) * g).sum()
    loss.backward()
    assert trained.mask is not None and trained.band is not None
    band, base = trained.band, trained.mask.selected.double()
    torch.testing.assert_close(blended(trained, q, k, v, base), trained(q, k, v, GRID, T).detach())
    eps, slope = 1e-6, torch.zeros(HEADS, dtype=torch.float64)
    for side in range(2):  # all rows at once: they do not act on each other
        change = torch.zeros_like(base).scatter_(-1, band.column[..., side : side + 1], eps)
        ends = (blended(trained, q, k, v, base + s * change) * g for s in (1, -1))
        up, down = (end.sum((0, 2, 3)) for end in ends)
        slope += (up - down) / (2 * eps) / 2
    expected = slope * base.shape[3] * 0.3 * 0.7
    torch.testing.assert_close(trained.policy.k_shift.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_p_follows_blended_attention() -> None:
    """In rows that Top-p decides a step of p moves 1 / score blocks at the threshold."""
    layout, p = LAYOUTS["ragged rows"], 0.6
    trained = attention(layout, policy=policy_of([0.01] * 3, [p] * 3))
    q, k, v = qkv()
    g = qkv(1)[0]
    (trained(q, k, v, GRID, T) * g).sum().backward()
    assert trained.mask is not None and trained.band is not None
    band, selected = trained.band, trained.mask.selected
    count, num_blocks = selected.sum(-1, keepdim=True), selected.shape[-1]
    assert (count > 1).any() and (
        band.score[..., :1] > 0.1 * p / count
    ).all()  # no slope is clipped
    step = (count > 1) / band.score[..., :1].double()  # one block is Top-k's floor
    has_first = count < num_blocks
    sides = 1 + has_first.double()
    eps, base = 1e-7, selected.double()
    change = torch.zeros_like(base)
    change.scatter_add_(-1, band.column[..., :1], step / sides)
    change.scatter_add_(-1, band.column[..., 1:], step / sides * has_first)
    ends = (blended(trained, q, k, v, base + s * eps * change) * g for s in (1, -1))
    up, down = (end.sum((0, 2, 3)) for end in ends)
    expected = (up - down) / (2 * eps) * p * (1 - p)
    torch.testing.assert_close(trained.policy.p_shift.grad.double(), expected, rtol=1e-4, atol=1e-6)


def blended(trained: SparseAttention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Return attention in which block c counts gate times, and what stands for it 1 - gate."""
    q_layout, kv_layout = trained.layout(q, k, v, GRID)
    q_block, kv_block = (torch.repeat_interleave(layout.sizes) for layout in (q_layout, kv_layout))
    per_token = gate[:, :, q_block]  # [B, H, Sq, Nk]
    exact = (q @ k.transpose(-1, -2) * DIM**-0.5).exp() * per_token[..., kv_block]
    total, norm = exact @ v, exact.sum(-1, keepdim=True)
    kind = trained.compensation
    onto = (kv_block[:, None] == torch.arange(kv_layout.num_blocks)).double()  # [Sk, Nk]
    if isinstance(kind, Centroid | GatedCentroid):
        k_mean, v_mean = (onto.T @ x / kv_layout.sizes[:, None] for x in (k, v))
        logit = q @ k_mean.transpose(-1, -2) * DIM**-0.5 + kv_layout.sizes.log()
        if isinstance(kind, GatedCentroid):
            logit = logit + kind.log_gate.detach()[:, None, None]
        weight = logit.exp() * (1 - per_token)
        total, norm = total + weight @ v_mean, norm + weight.sum(-1, keepdim=True)
    out = total / norm
    if isinstance(kind, Linear):
        weight = (q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)) * (1 - per_token)[..., kv_block]
        linear = (weight @ v) / weight.sum(-1, keepdim=True)
        out = out + linear @ kind.projection.detach()
    return out


# Gate and linear branch


@pytest.mark.parametrize("name", ["gate", "linear"])
def test_compensation_gradients_match_finite_differences(name: str) -> None:
    grid = TokenGrid(1, 1, 7)
    trained = in_double(
        SparseAttention(
            SparseMethod(
                RowMajor(q_block=3, kv_block=2), MeanPool(), Hybrid(k=0.3), **TRAINED[name]
            ),
            num_heads=2,
            head_dim=3,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.data.normal_(generator=generator)
    x = [
        torch.randn(1, 2, 7, 3, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    trained(*x, grid, T)  # fixes the mask, as a step does
    parameters = list(trained.parameters())
    assert torch.autograd.gradcheck(lambda *_: trained(*x, grid, T), (*x, *parameters))


def test_linear_leaves_full_rows_alone() -> None:
    x = qkv(dtype=torch.float32)
    linear = attention(policy=Hybrid(k=1.0), compensation=Linear())
    nn.init.normal_(linear.compensation.projection)
    dense = nn.functional.scaled_dot_product_attention(*x)
    torch.testing.assert_close(linear(*x, GRID, T), dense)


@pytest.mark.parametrize("apart", [20.0, 60.0, 90.0, 100.0, 200.0])
def test_linear_attention_of_features_that_hardly_meet_has_finite_gradients(apart: float) -> None:
    q, k, v = qkv(dtype=torch.float32)
    q[..., 1], k[..., 0] = q[..., 0] + apart, apart  # the features of k are near 0 where q's are 1
    x = [t.requires_grad_() for t in (q, k, v)]
    linear = attention(policy=Hybrid(k=0.0), compensation=Linear())
    nn.init.eye_(linear.compensation.projection)
    out = linear(*x, GRID, T)
    (out * qkv(2, torch.float32)[0]).sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (*x, linear.compensation.projection))


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        sizes = [x.numel() for x in found if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_linear_attention_over_clusters_is_exact_and_holds_no_pairs_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, sizes = 1500, ([700, 0, 1, 99, 200, 500, 0], [64, 0, 1, 435, 900, 63, 37])
    q, k, v = torch.randn(3, 1, 2, tokens, 4, generator=generator, dtype=torch.float64)
    q_layout, kv_layout = (
        BlockLayout(torch.tensor([0, *s]).cumsum(0).int(), tokens) for s in sizes
    )
    selected = torch.rand(1, 2, 7, 7, generator=generator) < 0.4
    selected[0, 1, 3] = True  # leaves out nothing
    left_out = (~selected).double().requires_grad_()
    x = [t.requires_grad_() for t in (q, k, v)]
    with Largest() as largest:
        blocks = BlockMask(q_layout, kv_layout, selected).blocks
        out = linear_complement(*x, left_out, blocks)
    assert largest.elements < 4 * v.numel()
    row, column = (torch.arange(7).repeat_interleave(y.sizes) for y in (q_layout, kv_layout))
    weight = (q.softmax(-1) @ k.softmax(-1).mT) * left_out[:, :, row][..., column]
    norm = weight.sum(-1, keepdim=True)
    expected = weight @ v / norm.masked_fill(norm == 0, 1)
    torch.testing.assert_close(out, expected)
    found, wanted = (
        torch.autograd.grad((y * v.detach()).sum(), (*x, left_out)) for y in (out, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# Router


def test_the_router_gets_the_soft_top_k_of_its_logits() -> None:
    """Against autograd through sigmoid(logit / T + c) with c solved for by bisection per row."""
    layout, temperature = LAYOUTS["ragged rows"], 0.6
    router = Router(temperature=temperature, side=9).for_heads(HEADS, DIM)
    in_double(router)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.2)
    q, k, v = qkv()
    q_layout, kv_layout = layout(q, k, v, GRID)
    scores = router(q, k, v, q_layout, kv_layout)
    mask = Hybrid(k=0.4)(scores)
    band = find_band(scores, mask, router.side)
    incoming = torch.randn(mask.selected.shape, dtype=torch.float64)
    gate = router.gate(q, k, band, mask)
    assert gate.abs().max() == 0
    loss = (gate * incoming.gather(-1, band.column)).sum()
    found = torch.autograd.grad(loss, list(router.parameters()))

    def relaxed() -> Tensor:
        means = []
        for x, change, own in ((q, router.q_change, q_layout), (k, router.k_change, kv_layout)):
            mean = torch.stack([b.mean(2) for b in x.split(own.sizes.tolist(), 2)], 2)
            means.append(mean + mean @ change)
        logit = means[0] @ means[1].transpose(-1, -2) * DIM**-0.5 + kv_layout.sizes.log()
        logit = logit / temperature
        wanted = mask.selected.sum(-1, keepdim=True)
        low, high = (torch.full_like(logit[..., :1], s * 100.0) for s in (-1, 1))
        for _ in range(100):
            middle = (low + high) / 2
            above = (logit + middle).sigmoid().sum(-1, keepdim=True) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((logit + low).sigmoid() * incoming).sum()

    eps = 1e-6
    with torch.no_grad():
        for parameter, grad in zip(router.parameters(), found, strict=True):
            for at in torch.cartesian_prod(*(torch.arange(0, n, 3) for n in parameter.shape)):
                ends = []
                for sign in (1, -2):
                    parameter[tuple(at)] += sign * eps
                    ends.append(relaxed())
                parameter[tuple(at)] += eps
                torch.testing.assert_close(
                    grad[tuple(at)], (ends[0] - ends[1]) / (2 * eps), rtol=1e-4, atol=1e-6
                )


def test_with_a_budget_of_token_pairs_the_router_moves_the_blocks_that_it_decides_on() -> None:
    """The nearest by score over tokens, and so that the row's soft tokens stay what they are."""
    sizes = torch.tensor([3, 20, 2, 9, 1, 7, 18])
    q_layout = BlockLayout(torch.tensor([0, 25, 60]).int(), 35)
    kv_layout = BlockLayout(torch.tensor([0, *sizes]).cumsum(0).int(), 20)
    router = in_double(Router(temperature=0.5, side=2).for_heads(HEADS, DIM))
    q, k, v = qkv()
    scores = router(q, k, v, q_layout, kv_layout)
    mask = TokenHybrid(k=0.5)(scores)
    band = find_band(scores, mask, router.side, by_pair=True)
    order = (scores.score / sizes).argsort(-1, descending=True)
    count = mask.selected.sum(-1, keepdim=True)
    assert count.min() >= 2 and count.max() <= 5
    nearest = order.gather(-1, count + torch.tensor([-1, -2, 0, 1]))
    assert torch.equal(band.column, nearest)
    size = sizes[band.column].double()

    def soft() -> Tensor:
        q_mean, k_mean = (
            torch.stack([b.mean(2) for b in x.split(own.tolist(), 2)], 2)
            @ (change + torch.eye(DIM))
            for x, own, change in (
                (q, q_layout.sizes, router.q_change),
                (k, sizes, router.k_change),
            )
        )
        logit = (q_mean @ k_mean.mT * DIM**-0.5).gather(-1, band.column) / 0.5
        wanted = size[..., :2].sum(-1, keepdim=True)
        low, high = (torch.full_like(logit[..., :1], s * 100.0) for s in (-1, 1))
        for _ in range(100):
            middle = (low + high) / 2
            above = (size * (logit + middle).sigmoid()).sum(-1, keepdim=True) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (logit + low).sigmoid()

    incoming = torch.randn(band.column.shape, dtype=torch.float64)
    (router.gate(q, k, band, mask) * incoming).sum().backward()
    with torch.no_grad():
        for parameter in (router.q_change, router.k_change):
            for at in [(0, 0, 0), (1, 3, 5), (2, 7, 1)]:
                ends = []
                for sign in (1, -2):
                    parameter[at] += sign * 1e-6
                    ends.append((soft() * incoming).sum())
                parameter[at] += 1e-6
                expected = (ends[0] - ends[1]) / 2e-6
                torch.testing.assert_close(parameter.grad[at], expected, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_the_router_follows_blended_attention() -> None:
    """Finite differences of attention whose gates move as SoftTop-k of the projections does."""
    layout, temperature = LAYOUTS["ragged rows"], 0.8
    trained = attention(layout, estimator=Router(temperature=temperature, side=9))
    in_double(trained.estimator)
    router = trained.estimator
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    q, k, v = qkv()
    g = qkv(1)[0]
    (trained(q, k, v, GRID, T) * g).sum().backward()
    assert trained.mask is not None
    base = trained.mask.selected.double()
    sizes = trained.mask.kv_layout.sizes

    def soft() -> Tensor:
        means = []
        for x, change, own in (
            (q, router.q_change, trained.mask.q_layout),
            (k, router.k_change, trained.mask.kv_layout),
        ):
            mean = torch.stack([b.mean(2) for b in x.split(own.sizes.tolist(), 2)], 2)
            means.append(mean + mean @ change)
        logit = (means[0] @ means[1].mT * DIM**-0.5 + sizes.log()) / temperature
        low, high = (torch.full_like(logit[..., :1], s * 100.0) for s in (-1, 1))
        for _ in range(100):
            middle = (low + high) / 2
            above = (logit + middle).sigmoid().sum(-1, keepdim=True) > base.sum(-1, keepdim=True)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (logit + low).sigmoid()

    eps, start = 1e-6, soft().detach()
    with torch.no_grad():
        for parameter in router.parameters():
            for at in [(0, 0, 0), (1, 3, 5), (2, 7, 1)]:
                ends = []
                for sign in (1, -2):
                    parameter[at] += sign * eps
                    gate = base + soft() - start
                    ends.append((blended(trained, q, k, v, gate) * g).sum())
                parameter[at] += eps
                expected = (ends[0] - ends[1]) / (2 * eps)
                torch.testing.assert_close(parameter.grad[at], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_empty_cluster_has_no_part_in_the_routers_gradient(count: int) -> None:
    def gradient(edges: list[int]) -> Tensor:
        q_layout, kv_layout = (
            BlockLayout(torch.tensor(ends).int(), 30) for ends in ([0, 30, 60], edges)
        )
        router = in_double(Router(temperature=0.6, side=len(edges) - 1).for_heads(HEADS, DIM))
        q, key, v = qkv()
        scores = router(q, key, v, q_layout, kv_layout)
        mask = Hybrid(k=count / (len(edges) - 1))(scores)
        band = find_band(scores, mask, router.side)
        incoming = torch.arange(1.0, 61, dtype=torch.float64)[kv_layout.offsets[band.column].long()]
        (router.gate(q, key, band, mask) * incoming).sum().backward()
        return router.k_change.grad

    expected = gradient([0, 12, 20, 37, 60])
    found = gradient([0, 12, 20, 20, 37, 60])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_the_backbone_gets_a_gradient_through_the_router_only_if_asked(detach: bool) -> None:
    trained = attention(estimator=Router(temperature=1.0, detach=detach))
    plain = attention()
    found = []
    for module in (trained, plain):
        x = [t.requires_grad_() for t in qkv(dtype=torch.float32)]
        (module(*x, GRID, T) * qkv(1, torch.float32)[0]).sum().backward()
        found.append([t.grad for t in x])
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert same == ([True] * 3 if detach else [False, False, True])


def test_a_changed_router_chooses_other_blocks() -> None:
    x = qkv(dtype=torch.float32)
    trained, plain = attention(estimator=Router()), attention()
    nn.init.normal_(trained.estimator.q_change)
    trained(*x, GRID, T), plain(*x, GRID, T)
    assert not torch.equal(trained.mask.selected, plain.mask.selected)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"side": 0}, {"side": 1.5}])
def test_router_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*allowed is"):
        Router(**change)
