"""Hybrid selection in Triton: a program bisects one row for its threshold, in registers.

A block is kept if fewer than top_k blocks, or less than the mass p, lie before it in descending
order. Both grow as the score falls, so the smallest score kept is found by bisection over the
floats in their order, as integers. It ends when a single block, or only blocks of equal score, lie
between the bounds; ties are then cut by their index. Where the block that crosses p is not kept,
the last block is taken back if the mass with it is above p. A budget is spent in the same way, by
gain as the score and tokens as the mass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import define_operator, on_device, power_of_2

_SIGN = tl.constexpr(0x7FFFFFFF)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest even integer


@triton.jit
def _order_of(x):
    """Return integers in the order of the floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _SIGN)


@triton.jit
def _float_of(order):
    return (order ^ ((order >> 31) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _before(score, weight, threshold):
    """Return how many blocks score above the threshold, and their weight; inf * 0 makes it NaN."""
    above = (score > threshold).to(tl.float32)
    return tl.sum(above, 0), tl.sum(above * weight, 0)


@triton.jit
def _load_row(ptrs, in_row):
    """Return a row of scores: NaN is infinite, and what lies outside the row comes last."""
    score = tl.load(ptrs, in_row, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))
    return tl.where(in_row, score, _LOWEST)


@triton.jit
def _top_k(share, num_columns):
    """Return a share of the blocks as a number of them, at least 1."""
    # in fp64 and back: fused with the sum, the product would not be rounded as PyTorch rounds it
    count = (share.to(tl.float64) * num_columns).to(tl.float32) + _TO_INTEGER - _TO_INTEGER
    return tl.minimum(tl.maximum(count, 1.0), num_columns)


@triton.jit
def _prefix(score, weight, in_row, num_columns, top_k, p, BY_SCORE: tl.constexpr):
    """Return the blocks with fewer than top_k blocks, or less weight than p, before them.

    The best one is always kept. With BY_SCORE the weight is the score.
    """
    highest = _order_of(tl.max(score, 0))
    lowest = _order_of(tl.min(tl.where(in_row, score, float("inf")), 0))

    # lowest <= threshold <= highest; num_above blocks score above highest, num_from from lowest on
    num_above = 0.0
    num_from = num_columns.to(tl.float32)
    while (lowest < highest) & (num_from - num_above > 1.0):
        middle = (lowest & highest) + ((lowest ^ highest) >> 1)
        count, mass = _before(score, weight, _float_of(middle))
        kept = (count < top_k) | (mass < p)
        highest = tl.where(kept, middle, highest)
        num_above = tl.where(kept, count, num_above)
        lowest = tl.where(kept, lowest, middle + 1)
        num_from = tl.where(kept, num_from, count)

    threshold = _float_of(lowest)
    selected = score >= threshold
    if num_from - num_above > 1.0:
        count, mass = _before(score, weight, threshold)
        tied = score == threshold
        rank = (tl.cumsum(tied.to(tl.int32), 0) - 1).to(tl.float32)
        if BY_SCORE:
            mass = mass + rank * threshold
        else:
            tied_weight = tl.where(tied, weight, 0.0)
            mass = mass + tl.cumsum(tied_weight, 0) - tied_weight
        kept = (count + rank < top_k) | (mass < p)
        selected = selected & (kept | (score > threshold))
    return selected


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_columns"])
def _hybrid_select_fwd(
    score_ptr, k_ptr, p_ptr, selected_ptr,
    stride_b, stride_h, stride_q, stride_k, k_stride, p_stride,
    num_heads, num_rows, num_columns, WIDTH: tl.constexpr, KEEP_CROSSING: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    in_row = column < num_columns
    p = tl.load(p_ptr + h * p_stride)
    top_k = _top_k(tl.load(k_ptr + h * k_stride), num_columns)
    top_k = tl.where(p >= 1.0, num_columns, top_k)
    ptrs = score_ptr + b * stride_b + h * stride_h + row * stride_q + column.to(tl.int64) * stride_k
    score = _load_row(ptrs, in_row)
    selected = _prefix(score, score, in_row, num_columns, top_k, p, True)
    if not KEEP_CROSSING:
        selected = selected & in_row
        count = tl.sum(selected.to(tl.float32), 0)
        mass = tl.sum(tl.where(selected, score, 0.0), 0)
        last_score = tl.min(tl.where(selected, score, float("inf")), 0)
        last = tl.max(tl.where(selected & (score == last_score), column, -1), 0)
        last = tl.where((count > top_k) & (mass > p), last, -1)
        selected = selected & (column != last)
    tl.store(selected_ptr + (head * num_rows + row) * num_columns + column, selected, in_row)


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_columns"])
def _budget_select_fwd(
    score_ptr, mass_ptr, q_offsets_ptr, kv_offsets_ptr, k_ptr, sure_ptr, p_ptr, selected_ptr,
    q_stride, kv_stride, k_stride, p_stride,
    num_heads, num_rows, num_columns, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    h = head % num_heads
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    in_row = column < num_columns
    place = (head * num_rows + row) * num_columns + column
    p = tl.load(p_ptr + h * p_stride)
    top_k = _top_k(tl.load(k_ptr + h * k_stride), num_columns)
    top_k = tl.where(p >= 1.0, num_columns, top_k)
    at = kv_offsets_ptr + head * kv_stride + column
    size = (tl.load(at + 1, in_row, other=0) - tl.load(at, in_row, other=0)).to(tl.float32)
    at = q_offsets_ptr + head * q_stride + row
    num_queries = tl.load(at + 1) - tl.load(at)

    mass = _load_row(mass_ptr + place, in_row)
    sure_k = _top_k(tl.load(sure_ptr + h * k_stride), num_columns)
    sure = _prefix(mass, mass, in_row, num_columns, sure_k, 0.0, True)
    planned = _prefix(mass, mass, in_row, num_columns, top_k, p, True)
    cost = tl.where(sure, 0.0, size)
    spare = tl.sum(tl.where(planned, cost, 0.0), 0) * tl.minimum(num_queries, 1)
    gain = tl.math.div_rn(_load_row(score_ptr + place, in_row), tl.maximum(size, 1.0))
    gain = tl.where(in_row & (cost == 0), -1.0, gain)
    chosen = _prefix(gain, cost, in_row, num_columns, 0.0, spare, False)
    chosen = chosen & (tl.minimum(cost, spare) > 0)  # without a spare token, none
    tl.store(selected_ptr + place, sure | chosen, in_row)


def _forward(score: Tensor, k: Tensor, p: Tensor, keep_crossing: bool) -> Tensor:
    batch, num_heads, num_rows, num_columns = score.shape
    selected = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    width = max(128, power_of_2(num_columns))
    strides = [x.stride(0) if x.numel() > 1 else 0 for x in (k, p)]
    with on_device(score.device):
        _hybrid_select_fwd[(num_rows, batch * num_heads)](
            score, k, p, selected, *score.stride(), *strides,
            num_heads, num_rows, num_columns,
            WIDTH=width, KEEP_CROSSING=keep_crossing, num_warps=min(max(width // 1024, 1), 16),
        )  # fmt: skip
    return selected


def _forward_budget(
    score: Tensor,
    mass: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    k: Tensor,
    sure_k: Tensor,
    p: Tensor,
) -> Tensor:
    batch, num_heads, num_rows, num_columns = score.shape
    selected = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    width = max(128, power_of_2(num_columns))
    with on_device(score.device):
        _budget_select_fwd[(num_rows, batch * num_heads)](
            score.contiguous(), mass.contiguous(), q_offsets.contiguous(), kv_offsets.contiguous(),
            k.contiguous(), sure_k.contiguous(), p.contiguous(), selected,
            *(0 if x.ndim == 1 else x.shape[-1] for x in (q_offsets, kv_offsets)),
            *(int(x.numel() > 1) for x in (k, p)),
            num_heads, num_rows, num_columns,
            WIDTH=width, num_warps=min(max(width // 512, 1), 16),
        )  # fmt: skip
    return selected


def _fake(score: Tensor, *_: object) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


forward = define_operator("hybrid_select", _forward, _fake)
forward_budget = define_operator("budget_select", _forward_budget, _fake)
