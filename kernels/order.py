"""The orders in which the Hopper kernels take their tiles."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import ceil_div, on_device

_ROWS, _OTHERS = 32, 256


def by_length(counts: Tensor) -> Tensor:
    """Return the rows of counts [B, H, N] head by head, sorted by length: int32 [B * H * N].

    Rows that run beside each other then walk through k and v at one pace and meet in the L2 cache,
    which a head of 100,000 tokens does not fit in. The longest is the first in even heads and the
    last in odd ones: what a program that takes every n-th row has too much in one head, it has too
    little in the next.
    """
    batch, num_heads, num_rows = counts.shape
    order = torch.empty(counts.numel(), dtype=torch.int32, device=counts.device)
    with on_device(counts.device):
        _by_length[(ceil_div(num_rows, _ROWS), batch * num_heads)](
            counts, order, num_rows, ROWS=_ROWS, OTHERS=_OTHERS, num_warps=4
        )
    return order


@triton.jit(do_not_specialize=["num_rows"])
def _by_length(count_ptr, order_ptr, num_rows, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """Count, for each row of the program, the rows of its head that come before it."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = tl.load(count_ptr + head * num_rows + row, row < num_rows, other=-1)[:, None]
    place = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_rows, OTHERS):
        other = start + tl.arange(0, OTHERS)
        count = tl.load(count_ptr + head * num_rows + other, other < num_rows, other=-1)[None, :]
        is_before = (count > mine) | ((count == mine) & (other[None, :] < row[:, None]))
        place += tl.sum(is_before.to(tl.int32), 1)
    place = tl.where(head % 2 == 0, place, num_rows - 1 - place)
    tl.store(order_ptr + head * num_rows + place, head * num_rows + row, row < num_rows)


def outliers_first(counts: Tensor, longest: int) -> Tensor:
    """Return the rows of counts [B, H, N], each at most `longest`: int32 [B * H * N].

    First those over four times as long as the mean, which would else end the kernel alone, the
    longest first; then head by head, so that what a head reads stays in the L2 cache.
    """
    count = counts.flatten(0, 1)  # [B * H, N]
    place = _places(*count.shape, longest, count.device) - count
    is_long = count > 4 * count.mean(dtype=torch.float32)
    place = torch.where(is_long, -count, place)
    return place.flatten().argsort(stable=True).to(torch.int32)


@cache
def _places(num_heads: int, num_rows: int, longest: int, device: torch.device) -> Tensor:
    head = torch.arange(1, num_heads + 1, dtype=torch.int32, device=device)
    return (head * (longest + 1))[:, None].expand(-1, num_rows)
