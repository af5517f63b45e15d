"""Spending a budget of tokens by score: the kernel against the sort, the sort against a loop."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_select.op import budget_select, hybrid_select

BUDGETS = [(0.0, 0.0, 0.5), (0.3, 0.0, 0.0), (0.4, 0.0, 0.5), (0.1, 0.5, 1.0), (0.2, 1.0, 0.5)]


def _offsets(*shape: int, device: str, most: int = 6) -> Tensor:
    """Blocks of 0 to most - 1 tokens."""
    sizes = torch.randint(0, most, shape, device=device)
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()


def _problem(
    device: str, shape: tuple[int, int, int, int], *, levels: int, own: bool
) -> list[Tensor]:
    """Scores and masses whose sums are exact in fp32 (many are equal), q and kv offsets."""
    score, mass = (torch.randint(0, levels, shape, device=device) * 2.0**-12 for _ in range(2))
    heads = shape[:2] if own else ()
    return [score, mass, *(_offsets(*heads, n, device=device) for n in shape[2:])]


@pytest.mark.parametrize(("k", "p", "guaranteed"), BUDGETS)
@pytest.mark.parametrize(
    ("shape", "own"), [((2, 1, 2, 7), True), ((1, 1, 2, 1), False), ((1, 2, 2, 130), False)]
)
def test_the_kernel_equals_the_sort(
    device: str, shape: tuple[int, int, int, int], own: bool, k: float, p: float, guaranteed: float
) -> None:
    for levels in (2, 500):
        torch.manual_seed(levels)
        problem = _problem(device, shape, levels=levels, own=own)
        shares = torch.full((shape[1],), k, device=device), torch.tensor([p], device=device)
        kernel, sort = (
            budget_select(*problem, *shares, guaranteed=guaranteed, backend=x)
            for x in ("triton", "reference")
        )
        assert torch.equal(kernel, sort)


@pytest.mark.parametrize(("k", "p", "guaranteed"), BUDGETS)
def test_the_sort_spends_as_one_who_takes_block_after_block(
    k: float, p: float, guaranteed: float
) -> None:
    torch.manual_seed(0)
    score, mass, q_offsets, kv_offsets = _problem("cpu", (1, 2, 5, 9), levels=40, own=True)
    shares = torch.tensor([k, k / 2]), torch.tensor([p, p / 2])
    found = budget_select(score, mass, q_offsets, kv_offsets, *shares, guaranteed=guaranteed)
    planned = hybrid_select(mass, *shares)
    size = kv_offsets.diff().tolist()[0]
    for h in range(2):
        for row in range(5):
            best = sorted(range(9), key=lambda n: -mass[0, h, row, n])
            count = max(1, round(float(shares[0][h] * guaranteed) * 9))
            kept = set(best[:count])
            spare = sum(size[h][n] for n in range(9) if planned[0, h, row, n] and n not in kept)
            if q_offsets[0, h, row] == q_offsets[0, h, row + 1]:
                spare = 0
            rest = [n for n in range(9) if n not in kept and size[h][n]]
            for n in sorted(rest, key=lambda n: -score[0, h, row, n] / size[h][n]):
                if spare <= 0:
                    break
                kept.add(n)
                spare -= size[h][n]
            assert set(found[0, h, row].nonzero()[:, 0].tolist()) == kept


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_nan_comes_first_and_costs_what_its_block_costs(device: str, backend: str) -> None:
    score = torch.tensor([0.4, 0.3, torch.nan, 0.2], device=device).view(1, 1, 1, 4)
    mass = torch.tensor([0.6, 0.3, 0.1, 0.0], device=device).view(1, 1, 1, 4)
    offsets = torch.tensor([0, 2], device=device), torch.tensor([0, 2, 4, 7, 9], device=device)
    shares = torch.tensor([0.5], device=device), torch.zeros(1, device=device)
    found = budget_select(score, mass, *offsets, *shares, guaranteed=0.0, backend=backend)
    assert found.flatten().tolist() == [True, False, True, False]


def test_what_is_refused() -> None:
    score, mass, *offsets = _problem("cpu", (1, 2, 3, 4), levels=5, own=False)
    k = p = torch.tensor([0.5])
    with pytest.raises(ValueError, match="mass must be"):
        budget_select(score, mass[..., :3], *offsets, k, p, guaranteed=0.5)
    with pytest.raises(ValueError, match="kv_offsets must be"):
        budget_select(score, mass, offsets[0], offsets[0], k, p, guaranteed=0.5)
    with pytest.raises(ValueError, match="guaranteed must be"):
        budget_select(score, mass, *offsets, k, p, guaranteed=1.5)
    with pytest.raises(ValueError, match="k must be"):
        budget_select(score, mass, *offsets, torch.ones(3), p, guaranteed=0.5)
    with pytest.raises(ValueError, match="score must be"):
        budget_select(score[0], mass, *offsets, k, p, guaranteed=0.5)
