"""SpargeAttention's tuning: each head's budget from a bound on its own output error.

Bisects the mass p, then the gap of the second filter (arXiv 2502.18137, section 3.6). The bounds
are on the relative L1 error sum |out - dense| / sum |dense| of a head on one input.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.dense_attention.op import dense_attention
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import TokenGrid, permute_qkv
from gossamer.sparse.mask import BlockScores, keep_text

_MASS_STEPS = 10  # of bisection: 1 / 1024
_WIDEST_GAP, _GAP_STEPS = 50.0, 9  # 50 / 512, about 0.1


@dataclass(frozen=True)
class Captured:
    """One layer's inputs on one sample: q, k, v [B, H, S, D] in sequence order."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: TokenGrid


@dataclass(frozen=True)
class Tuned:
    """One layer's budgets, fp32 [H], and what they come to on the inputs."""

    p: Tensor
    skip_below: Tensor | None  # None where the compensation has no second filter
    error: Tensor  # largest relative L1 error over the inputs
    density: Tensor  # mean over the inputs


@dataclass(frozen=True)
class _Input:
    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    scores: BlockScores


@torch.no_grad()
def tune(
    attention: SparseAttention, inputs: Sequence[Captured], *, l1: float = 0.05, l2: float = 0.06
) -> Tuned:
    """Return the least p whose error is at most l1 for each head, then the least gap for l2.

    The result holds for the worst input: the largest of the inputs' p, then of their gaps. The
    policy's k stays as it is, and the attention too. Deterministic; costs about 20 sparse
    attentions and a dense one for each input.
    """
    if not inputs:
        raise ValueError("inputs=[]: allowed is one or more captured q, k, v; capture some first")
    if not 0 <= l1 <= l2:
        raise ValueError(f"l1={l1}, l2={l2}: allowed is 0 <= l1 <= l2; e.g. 0.05 and 0.06")
    attention = deepcopy(attention)
    k = attention.policy.k.expand(inputs[0].q.shape[1]).clone()
    found = [_in_blocks(attention, given) for given in inputs]
    compensation = attention.compensation
    filters = compensation if isinstance(compensation, FilteredDrop) else None
    if filters:
        filters.set_limit(torch.full_like(k, float("-inf")))

    def at_mass(p: Tensor, given: _Input) -> Tensor:
        attention.policy.set_budget(k, p)
        return _error(attention, given)[0]

    p = torch.stack([_least(at_mass, x, 1.0, _MASS_STEPS, l1) for x in found]).amax(0)
    attention.policy.set_budget(k, p)
    skip_below = None
    if filters:

        def at_gap(gap: Tensor, given: _Input) -> Tensor:
            filters.set_limit(-gap)
            return _error(attention, given)[0]

        gaps = [_least(at_gap, x, _WIDEST_GAP, _GAP_STEPS, l2) for x in found]
        skip_below = -torch.stack(gaps).amax(0)
        filters.set_limit(skip_below)
    results = [_error(attention, given) for given in found]
    error, density = (torch.stack(values) for values in zip(*results, strict=True))
    return Tuned(p, skip_below, error.amax(0), density.mean(0))


def _in_blocks(attention: SparseAttention, given: Captured) -> _Input:
    q_layout, kv_layout = attention.layout(given.q, given.k, given.v, given.grid)
    q, k, v = permute_qkv(q_layout, kv_layout, given.q, given.k, given.v)
    return _Input(
        q, k, v, dense_attention(q, k, v), attention.estimator(q, k, v, q_layout, kv_layout)
    )


def _error(attention: SparseAttention, given: _Input) -> tuple[Tensor, Tensor]:
    """Return the relative L1 error and the density of each head, fp32 [H]."""
    mask = keep_text(attention.policy(given.scores))
    out = attention.attend(given.q, given.k, given.v, mask)
    change = (out.float() - given.dense.float()).abs().sum((0, 2, 3))
    size = given.dense.float().abs().sum((0, 2, 3))
    return change / size.clamp(min=torch.finfo(size.dtype).tiny), mask.density.mean(0).float()


def _least(
    error: Callable[[Tensor, _Input], Tensor], given: _Input, most: float, steps: int, bound: float
) -> Tensor:
    """Bisect from 0 to `most` for the least value of each head at which its error is in bounds."""
    high = torch.full((given.q.shape[1],), most, device=given.q.device)
    low = torch.zeros_like(high)
    for _ in range(steps):
        middle = (low + high) / 2
        is_in = error(middle, given) <= bound
        low, high = torch.where(is_in, low, middle), torch.where(is_in, middle, high)
    return high
