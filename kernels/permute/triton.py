"""Permutation of tokens in Triton: whole rows are moved, as integers of the type's size.

The way back writes rows to their tokens instead of reading them from there, so no inverse order is
needed; a permutation gives every row one writer. Backward of each way is the other.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGER = {2: torch.int16, 4: torch.int32}
_ROWS = 32  # of one program
_NUM_WARPS = 4


@triton.jit
def _move_rows(
    x_ptr, out_ptr, order_ptr,
    stride_xb, stride_xh, stride_xs, stride_rb, stride_rh,
    num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = position < num_tokens
    order_ptr += b * stride_rb + h * stride_rh
    token = tl.load(order_ptr + position, mask=is_token, other=0).to(tl.int64)
    if INVERSE:
        source, target = position.to(tl.int64), token
    else:
        source, target = token, position.to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    mask = is_token[:, None] & (dim < HEAD_DIM)[None, :]
    x_ptr += b * stride_xb + h * stride_xh
    rows = tl.load(x_ptr + source[:, None] * stride_xs + dim[None, :], mask=mask, other=0)
    out_ptr += head * num_tokens * HEAD_DIM
    tl.store(out_ptr + target[:, None] * HEAD_DIM + dim[None, :], rows, mask=mask)


# Lengths, and the orders' strides with them, change; specialising on them would compile again.
_RUN_TIME = [f"{name}{i}" for name in ("num_tokens", "stride_rb", "stride_rh") for i in range(3)]


@triton.jit(do_not_specialize=[*_RUN_TIME, "num_heads"])
def _permute(
    x0_ptr, out0_ptr, order0_ptr,
    stride_xb0, stride_xh0, stride_xs0, stride_rb0, stride_rh0, num_tokens0,
    x1_ptr, out1_ptr, order1_ptr,
    stride_xb1, stride_xh1, stride_xs1, stride_rb1, stride_rh1, num_tokens1,
    x2_ptr, out2_ptr, order2_ptr,
    stride_xb2, stride_xh2, stride_xs2, stride_rb2, stride_rh2, num_tokens2,
    num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
    NUM: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(2)
    if which == 0:
        _move_rows(
            x0_ptr, out0_ptr, order0_ptr,
            stride_xb0, stride_xh0, stride_xs0, stride_rb0, stride_rh0, num_heads, num_tokens0,
            HEAD_DIM, PADDED_DIM, ROWS, INVERSE,
        )  # fmt: skip
    if NUM > 1 and which == 1:
        _move_rows(
            x1_ptr, out1_ptr, order1_ptr,
            stride_xb1, stride_xh1, stride_xs1, stride_rb1, stride_rh1, num_heads, num_tokens1,
            HEAD_DIM, PADDED_DIM, ROWS, INVERSE,
        )  # fmt: skip
    if NUM > 2 and which == 2:
        _move_rows(
            x2_ptr, out2_ptr, order2_ptr,
            stride_xb2, stride_xh2, stride_xs2, stride_rb2, stride_rh2, num_heads, num_tokens2,
            HEAD_DIM, PADDED_DIM, ROWS, INVERSE,
        )  # fmt: skip


@torch.library.custom_op("gossamer::permute", mutates_args=())
def _permute_op(tensors: list[Tensor], orders: list[Tensor], inverse: bool) -> list[Tensor]:
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
    arguments: list[Any] = []
    for x, order, out in zip(tensors, orders, results, strict=True):
        x = x if x.stride(-1) == 1 else x.contiguous()
        order = order if order.stride(-1) == 1 else order.contiguous()
        integer = _INTEGER[x.element_size()]
        arguments += x.view(integer), out.view(integer), order, *x.stride()[:3]
        arguments += *(order.stride()[:2] if order.ndim == 3 else (0, 0)), x.shape[2]
    num, (batch, heads, _, dim) = len(tensors), tensors[0].shape
    arguments += arguments[-9:] * (3 - num)  # never read
    longest = max(x.shape[2] for x in tensors)
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _permute[(triton.cdiv(longest, _ROWS), batch * heads, num)](
            *arguments, heads,
            HEAD_DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), ROWS=_ROWS, INVERSE=inverse,
            NUM=num, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return results


@_permute_op.register_fake
def _(tensors: list[Tensor], orders: list[Tensor], inverse: bool) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, orders, ctx.inverse = inputs
    ctx.save_for_backward(*orders)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    orders = list(ctx.saved_tensors)
    return _permute_op(grads, orders, not ctx.inverse), [None] * len(orders), None


_permute_op.register_autograd(_backward, setup_context=_save_for_backward)


def forward(tensors: Sequence[Tensor], orders: Sequence[Tensor], inverse: bool) -> list[Tensor]:
    """Return each tensor [B, H, S, D] in its order, or brought back from it; differentiable."""
    return _permute_op(list(tensors), list(orders), inverse)
