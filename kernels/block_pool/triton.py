"""Mean of each block in Triton, forward and backward, of one tensor or of two in one launch.

A program sums one block; a long block is shared by several programs, whose parts are added in a
fixed order afterwards, so that one large cluster does not hold up the rest.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import ceil_div, define_operator, on_device, power_of_2
from ..blocks import head_stride

# Counts change from call to call; specialising on them would compile again.
_RUN_TIME = [
    "num_heads", "num_x_blocks", "num_y_blocks", "x_parts", "y_parts",
    "x_offsets_stride", "y_offsets_stride",
]  # fmt: skip


@triton.jit
def _span(offsets_ptr, stride, head, block):
    """Return the first token of a block, int64, and its number of tokens, int32."""
    offsets_ptr += head * stride
    start = tl.load(offsets_ptr + block)
    return start.to(tl.int64), (tl.load(offsets_ptr + block + 1) - start).to(tl.int32)


@triton.jit
def _sum_part(
    x_ptr, mean_ptr, offsets_ptr, offsets_stride, program, num_blocks, parts, num_heads, head_dim,
    stride_b, stride_h, stride_s, stride_d,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write one part's share of the mean of one block."""
    block, part = program // parts, program % parts
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    dim = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK_S)
    start, count = _span(offsets_ptr, offsets_stride, head, block)
    token = start + row
    ptrs = x_ptr + b * stride_b + h * stride_h
    ptrs += token[:, None] * stride_s + dim.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([BLOCK_S, BLOCK_D], ACC)
    for first in range(part * BLOCK_S, count, parts * BLOCK_S):
        mask = (first + row < count)[:, None] & (dim < head_dim)[None, :]
        total += tl.load(ptrs + tl.cast(first, tl.int64) * stride_s, mask, other=0.0).to(ACC)
    share = tl.sum(total, 0) / tl.maximum(count, 1).to(ACC)
    at = (part * tl.num_programs(1) + head) * num_blocks + block
    tl.store(mean_ptr + at * head_dim + dim, share, mask=dim < head_dim)


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_mean_fwd(
    x_ptr, x_mean_ptr, x_offsets_ptr, y_ptr, y_mean_ptr, y_offsets_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_yb, stride_yh, stride_ys, stride_yd,
    num_heads, num_x_blocks, num_y_blocks, x_parts, y_parts, x_offsets_stride, y_offsets_stride,
    head_dim,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_x_blocks * x_parts:
        _sum_part(
            x_ptr, x_mean_ptr, x_offsets_ptr, x_offsets_stride, program,
            num_x_blocks, x_parts, num_heads, head_dim,
            stride_xb, stride_xh, stride_xs, stride_xd, BLOCK_S, BLOCK_D, ACC,
        )  # fmt: skip
    else:
        program -= num_x_blocks * x_parts
        _sum_part(
            y_ptr, y_mean_ptr, y_offsets_ptr, y_offsets_stride, program,
            num_y_blocks, y_parts, num_heads, head_dim,
            stride_yb, stride_yh, stride_ys, stride_yd, BLOCK_S, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def _spread_part(
    grad_ptr, dx_ptr, offsets_ptr, offsets_stride, program, num_blocks, parts, num_tokens,
    head_dim,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one part of the tokens of one block."""
    block, part = program // parts, program % parts
    head = tl.program_id(1).to(tl.int64)
    dim = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK_S)
    start, count = _span(offsets_ptr, offsets_stride, head, block)
    grad = tl.load(grad_ptr + (head * num_blocks + block) * head_dim + dim, dim < head_dim, other=0)
    share = (grad / tl.maximum(count, 1).to(grad.dtype)).to(dx_ptr.dtype.element_ty)
    share = tl.broadcast_to(share[None, :], [BLOCK_S, BLOCK_D])
    token = head * num_tokens + start + row
    ptrs = dx_ptr + token[:, None] * head_dim + dim[None, :]
    for first in range(part * BLOCK_S, count, parts * BLOCK_S):
        mask = (first + row < count)[:, None] & (dim < head_dim)[None, :]
        tl.store(ptrs + tl.cast(first, tl.int64) * head_dim, share, mask)


@triton.jit(do_not_specialize=[*_RUN_TIME[1:], "num_x_tokens", "num_y_tokens"])
def _block_mean_bwd(
    x_grad_ptr, dx_ptr, x_offsets_ptr, y_grad_ptr, dy_ptr, y_offsets_ptr,
    num_x_tokens, num_y_tokens, num_x_blocks, num_y_blocks, x_parts, y_parts,
    x_offsets_stride, y_offsets_stride, head_dim,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_x_blocks * x_parts:
        _spread_part(
            x_grad_ptr, dx_ptr, x_offsets_ptr, x_offsets_stride, program,
            num_x_blocks, x_parts, num_x_tokens, head_dim, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    else:
        program -= num_x_blocks * x_parts
        _spread_part(
            y_grad_ptr, dy_ptr, y_offsets_ptr, y_offsets_stride, program,
            num_y_blocks, y_parts, num_y_tokens, head_dim, BLOCK_S, BLOCK_D,
        )  # fmt: skip


_PART = 1024  # tokens of a block that one program sums without help
_MAX_PARTS = 8


def _num_parts(block_size: int) -> int:
    return min(ceil_div(block_size, _PART), _MAX_PARTS)


def _tile(head_dim: int) -> dict[str, int]:
    return {"BLOCK_S": 32, "BLOCK_D": min(power_of_2(head_dim), 128), "num_warps": 2}


def _new_means(x: Tensor, offsets: Tensor, parts: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (*x.shape[:2], offsets.shape[-1] - 1, x.shape[3])
    return x.new_empty((parts, *shape) if parts > 1 else shape, dtype=dtype)


def _forward(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    return _launch_fwd(x, x, offsets, offsets, block_size, 0)[0]


def _forward_pair(
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_block_size: int,
    y_block_size: int,
) -> tuple[Tensor, Tensor]:
    return _launch_fwd(x, y, x_offsets, y_offsets, x_block_size, y_block_size)


def _launch_fwd(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, x_size: int, y_size: int
) -> tuple[Tensor, Tensor]:
    """Return the means of x and of y; with y_size 0 those of y are left out."""
    x_offsets, y_offsets = x_offsets.contiguous(), y_offsets.contiguous()
    x_parts, y_parts = _num_parts(x_size), _num_parts(y_size)
    x_mean = _new_means(x, x_offsets, x_parts)
    y_mean = _new_means(y, y_offsets, y_parts) if y_parts else x_mean
    num_x, num_y = x_offsets.shape[-1] - 1, y_offsets.shape[-1] - 1
    tile = _tile(x.shape[3])
    grid = (
        num_x * x_parts + num_y * y_parts,
        x.shape[0] * x.shape[1],
        ceil_div(x.shape[3], tile["BLOCK_D"]),
    )
    with on_device(x.device):
        _block_mean_fwd[grid](
            x, x_mean, x_offsets, y, y_mean, y_offsets, *x.stride(), *y.stride(),
            x.shape[1], num_x, num_y, x_parts, y_parts,
            head_stride(x_offsets), head_stride(y_offsets), x.shape[3],
            ACC=tl.float64 if x_mean.dtype == torch.float64 else tl.float32, **tile,
        )  # fmt: skip
    return x_mean.sum(0) if x_parts > 1 else x_mean, y_mean.sum(0) if y_parts > 1 else y_mean


def _backward(
    grad: Tensor, offsets: Tensor, block_size: int, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    return _launch_bwd(grad, grad, offsets, offsets, block_size, 0, num_tokens, num_tokens, dtype)[
        0
    ]


def _backward_pair(
    x_grad: Tensor,
    y_grad: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_block_size: int,
    y_block_size: int,
    num_x_tokens: int,
    num_y_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _launch_bwd(
        x_grad, y_grad, x_offsets, y_offsets,
        x_block_size, y_block_size, num_x_tokens, num_y_tokens, dtype,
    )  # fmt: skip


def _launch_bwd(
    x_grad: Tensor,
    y_grad: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_size: int,
    y_size: int,
    num_x_tokens: int,
    num_y_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    x_grad, y_grad = x_grad.contiguous(), y_grad.contiguous()
    x_offsets, y_offsets = x_offsets.contiguous(), y_offsets.contiguous()
    x_parts, y_parts = _num_parts(x_size), _num_parts(y_size)
    dx = _new_gradient(x_grad, num_x_tokens, dtype)
    dy = _new_gradient(y_grad, num_y_tokens, dtype) if y_parts else dx
    num_x, num_y, head_dim = x_grad.shape[2], y_grad.shape[2], x_grad.shape[3]
    tile = _tile(head_dim)
    grid = (
        num_x * x_parts + num_y * y_parts,
        x_grad.shape[0] * x_grad.shape[1],
        ceil_div(head_dim, tile["BLOCK_D"]),
    )
    with on_device(x_grad.device):
        _block_mean_bwd[grid](
            x_grad, dx, x_offsets, y_grad, dy, y_offsets,
            num_x_tokens, num_y_tokens, num_x, num_y, x_parts, y_parts,
            head_stride(x_offsets), head_stride(y_offsets), head_dim, **tile,
        )  # fmt: skip
    return dx, dy


def _new_gradient(grad: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((*grad.shape[:2], num_tokens, grad.shape[3]), dtype=dtype)


def _fake(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    return _new_means(x, offsets, 1)


def _fake_pair(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, *_: int
) -> tuple[Tensor, Tensor]:
    return _new_means(x, x_offsets, 1), _new_means(y, y_offsets, 1)


def _fake_backward(
    grad: Tensor, offsets: Tensor, block_size: int, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    return _new_gradient(grad, num_tokens, dtype)


def _fake_backward_pair(
    x_grad: Tensor,
    y_grad: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_block_size: int,
    y_block_size: int,
    num_x_tokens: int,
    num_y_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dx = _new_gradient(x_grad, num_x_tokens, dtype)
    return dx, _new_gradient(y_grad, num_y_tokens, dtype)


forward = define_operator("block_mean", _forward, _fake)
forward_pair = define_operator("block_mean_pair", _forward_pair, _fake_pair)
_mean_backward = define_operator("block_mean_backward", _backward, _fake_backward)
_pair_backward = define_operator("block_mean_pair_backward", _backward_pair, _fake_backward_pair)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, ctx.block_size = inputs
    ctx.num_tokens, ctx.dtype = x.shape[2], x.dtype
    ctx.save_for_backward(offsets)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return _mean_backward(grad, offsets, ctx.block_size, ctx.num_tokens, ctx.dtype), None, None


def _setup_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, *offsets, x_size, y_size = inputs
    ctx.save_for_backward(*offsets)
    ctx.sizes, ctx.num_tokens, ctx.dtype = (x_size, y_size), (x.shape[2], y.shape[2]), x.dtype


def _differentiate_pair(ctx: Any, x_grad: Tensor, y_grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _pair_backward(
        x_grad, y_grad, *ctx.saved_tensors, *ctx.sizes, *ctx.num_tokens, ctx.dtype
    )
    return *grads, None, None, None, None


torch.library.register_autograd("gossamer::block_mean", _differentiate, setup_context=_setup)
torch.library.register_autograd(
    "gossamer::block_mean_pair", _differentiate_pair, setup_context=_setup_pair
)
