"""Hybrid selection: the kernel against the sort, exactly where sums are exact."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_select.op import hybrid_select

both = pytest.mark.parametrize("backend", ["reference", "triton"])
BUDGETS = [(0, 0), (0.3, 0), (1, 0), (0, 0.5), (0.2, 0.7), (0, 0.999), (0.1, 1)]
SHAPES = [(2, 3, 4, 7), (1, 1, 2, 1), (1, 2, 3, 130)]


def _budget(k: float, p: float, device: str) -> tuple[Tensor, Tensor]:
    return torch.tensor([float(k)], device=device), torch.tensor([float(p)], device=device)


def _dyadic(*shape: int, device: str, levels: int = 8) -> Tensor:
    """Random multiples of 2**-12: sums of them are exact in fp32, and many are equal."""
    return torch.randint(0, levels, shape, device=device) * 2.0**-12


@pytest.mark.parametrize(("k", "p"), BUDGETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [1, 3, 500])
def test_the_kernel_equals_the_sort_where_sums_are_exact(
    device: str, shape: tuple[int, ...], k: float, p: float, levels: int
) -> None:
    score = _dyadic(*shape, device=device, levels=levels)
    largest = score.sum(-1).max()  # so that p is crossed inside the rows
    budget = torch.tensor([float(k)], device=device), (p * largest).clamp(max=1).view(1)
    kernel, sort = (hybrid_select(score, *budget, backend=x) for x in ("triton", "reference"))
    assert torch.equal(kernel, sort)


@both
@pytest.mark.parametrize(("k", "p"), BUDGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_rows_keep_a_prefix_that_ends_where_the_budget_does(
    device: str, shape: tuple[int, ...], k: float, p: float, backend: str
) -> None:
    score = (3 * torch.randn(shape, device=device)).softmax(-1)
    num_blocks = shape[-1]
    selected = hybrid_select(score, *_budget(k, p, device), backend=backend)
    count = selected.sum(-1, keepdim=True)
    ordered, order = score.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(num_blocks, device=device)
    assert torch.equal(selected.gather(-1, order), rank < count)
    mass_before = ordered.cumsum(-1) - ordered
    # A block may be in or out where fp32 cannot tell the mass before it from p.
    fewest, most = (
        (mass_before < p + slack).sum(-1, keepdim=True).clamp(min=max(1, round(k * num_blocks)))
        for slack in (-1e-6, 1e-6)
    )
    if p >= 1:
        fewest = most = torch.full_like(count, num_blocks)
    assert ((count >= fewest) & (count <= most)).all()


def test_seven_hundred_blocks(device: str) -> None:
    score = torch.rand(1, 1, 3, 700, device=device).softmax(-1)
    for k, p in ((0.05, 0.0), (0.0, 0.4)):
        results = (
            hybrid_select(score, *_budget(k, p, device), backend=x) for x in ("triton", "reference")
        )
        counts = [selected.sum(-1) for selected in results]
        assert (counts[0] - counts[1]).abs().max() <= (1 if p else 0)


@both
@pytest.mark.parametrize("levels", [1, 3, 500])
def test_without_the_crossing_block_a_row_is_the_longest_prefix_within_p(
    device: str, levels: int, backend: str
) -> None:
    score = _dyadic(1, 2, 4, 37, device=device, levels=levels)
    score[0, 0, 0] = 0  # a row without mass
    num_blocks = score.shape[-1]
    for share, k in ((0.0, 0.0), (0.37, 0.0), (0.5, 0.2), (1.0, 0.0)):
        p = (score.sum(-1).max() * share).clamp(max=0.999).view(1)
        budget = torch.tensor([k], device=device), p
        kept = hybrid_select(score, *budget, keep_crossing=False, backend=backend)
        more = hybrid_select(score, *budget, backend=backend)
        assert not (kept & ~more).any()
        count, count_more = kept.sum(-1), more.sum(-1)
        fewest = max(1, round(k * num_blocks))
        mass = (score.double() * more).sum(-1)
        crossed = (count_more > fewest) & (mass > p.double())
        assert torch.equal(count, count_more - crossed.long())
        assert ((count == fewest) | ((score.double() * kept).sum(-1) <= p.double())).all()


@both
def test_the_share_is_rounded_to_even_and_ties_go_to_the_lower_block(
    device: str, backend: str
) -> None:
    score = torch.full((1, 1, 1, 10), 0.1, device=device)
    for k, count in ((0.25, 2), (0.35, 4), (0.34, 3), (0.04, 1)):
        selected = hybrid_select(score, *_budget(k, 0, device), backend=backend)
        assert selected.flatten().tolist() == [True] * count + [False] * (10 - count)


@both
def test_nan_and_infinity_come_first_and_leave_the_row_to_k(device: str, backend: str) -> None:
    score = torch.full((1, 1, 4, 6), 0.125, device=device)
    score[..., 0, :] = torch.nan
    score[..., 1, 4] = torch.nan
    score[..., 2, 2:4] = torch.inf
    score[..., 3, :] = 0
    selected = hybrid_select(score, *_budget(0.5, 0.9, device), backend=backend)
    assert [row.nonzero().flatten().tolist() for row in selected[0, 0]] == [
        [0, 1, 2],
        [0, 1, 4],
        [0, 2, 3],
        [0, 1, 2, 3, 4, 5],  # a mass of 0.9 is never reached
    ]
    assert hybrid_select(score, *_budget(0, 1, device), backend=backend).all()
    assert (hybrid_select(score, *_budget(0, 0, device), backend=backend).sum(-1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_head_has_its_own_budget_in_any_layout(device: str, dtype: torch.dtype) -> None:
    score = _dyadic(2, 3, 9, 4, device=device).transpose(2, 3).to(dtype)
    k = torch.tensor([0.25, 0.5, 0.0], device=device)
    p = torch.tensor([0.0, 0.004, 1.0], device=device)
    kernel, sort = (hybrid_select(score, k, p, backend=x) for x in ("triton", "reference"))
    assert torch.equal(kernel, sort) and kernel.is_contiguous()
    assert (kernel[:, 0].sum(-1) == 2).all() and kernel[:, 2].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.ones(1, 2, 3, 4).long()}, "score must be a floating-point"),
        ({"score": torch.ones(3, 4)}, "score must be a floating-point"),
        ({"k": torch.ones(3)}, r"k must be float32 of shape \[1\] or \[2\]"),
        ({"p": torch.ones(2).double()}, "p must be float32"),
        ({"p": torch.ones(2, device="meta")}, "p must be on score's device cpu, got meta"),
        ({"backend": "sort"}, "backend must be"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"score": torch.ones(1, 2, 3, 4), "k": torch.ones(2), "p": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        hybrid_select(**(arguments | change))  # type: ignore[arg-type]


def test_the_operator_passes_opcheck(device: str) -> None:
    score = torch.rand(1, 2, 3, 5, device=device)
    budget = _budget(0.3, 0.5, device)
    hybrid_select(score, *budget, backend="triton")
    torch.library.opcheck(torch.ops.gossamer.hybrid_select.default, (score, *budget, True))
