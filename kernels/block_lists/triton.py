"""Index lists in Triton: both directions in one launch, by prefix sums.

Of the items of a list, the selected ones go to the front in order and the others, as zeros, to the
back, so that one store writes each list whole.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import ceil_div, define_operator, on_device


@triton.jit
def _write_lists(
    selected_ptr, count_ptr, list_ptr, program, num_lists, num_items, list_stride, item_stride,
    LISTS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    owner = program * LISTS + tl.arange(0, LISTS)
    item = tl.arange(0, ITEMS)
    in_lists = owner < num_lists
    selected_ptrs = selected_ptr + head * num_lists * num_items + owner[:, None] * list_stride
    list_ptrs = list_ptr + (head * num_lists + owner)[:, None] * num_items
    count = tl.zeros([LISTS], tl.int32)
    for first in range(0, num_items, ITEMS):
        index = first + item
        mask = in_lists[:, None] & (index < num_items)[None, :]
        chosen = tl.load(selected_ptrs + index[None, :] * item_stride, mask, other=0).to(tl.int32)
        before = count[:, None] + tl.cumsum(chosen, 1) - chosen
        at = tl.where(chosen != 0, before, num_items - 1 - (index[None, :] - before))
        tl.store(list_ptrs + at, chosen * index[None, :], mask)
        count += tl.sum(chosen, 1)
    tl.store(count_ptr + head * num_lists + owner, count, in_lists)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _block_lists_fwd(
    selected_ptr, num_columns_ptr, columns_ptr, num_rows_ptr, rows_ptr, num_rows, num_columns,
    LISTS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_programs = tl.cdiv(num_rows, LISTS)
    if program < row_programs:
        _write_lists(
            selected_ptr, num_columns_ptr, columns_ptr, program, num_rows, num_columns,
            num_columns, 1, LISTS, ITEMS,
        )  # fmt: skip
    else:
        _write_lists(
            selected_ptr, num_rows_ptr, rows_ptr, program - row_programs, num_columns, num_rows,
            1, num_columns, LISTS, ITEMS,
        )  # fmt: skip


_LISTS, _ITEMS = 4, 256


def _forward(selected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    selected = selected.contiguous()
    batch, num_heads, num_rows, num_columns = selected.shape
    lists = _fake(selected)
    programs = ceil_div(num_rows, _LISTS) + ceil_div(num_columns, _LISTS)
    with on_device(selected.device):
        _block_lists_fwd[(programs, batch * num_heads)](
            selected, *lists, num_rows, num_columns,
            LISTS=_LISTS, ITEMS=_ITEMS, num_warps=4,
        )  # fmt: skip
    return lists


def _fake(selected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_rows, num_columns = selected.shape
    new = partial(selected.new_empty, dtype=torch.int32)
    return (
        new((batch, num_heads, num_rows)),
        new((batch, num_heads, num_rows, num_columns)),
        new((batch, num_heads, num_columns)),
        new((batch, num_heads, num_columns, num_rows)),
    )


forward = define_operator("block_lists", _forward, _fake)
