"""Block scores in Triton: logits tile by tile, then the softmax of each row in place.

The dot is tf32 in three terms, which keeps fp32 accuracy. It runs on k_mean minus the mean of 16
of its blocks: any key would cancel in the softmax, so a sample serves as well as all of them. The
logits, in units of log2, pass through the output. A program that computed its rows whole, in one
launch, walked over all columns one tile after the other and took longer than both launches.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import ceil_div, define_operator, on_device, power_of_2
from ..blocks import head_stride

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_heads", "num_q_blocks", "num_kv_blocks", "offsets_stride"])
def _block_logits(
    q_ptr, k_ptr, offsets_ptr, out_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    num_heads, num_q_blocks, num_kv_blocks, offsets_stride, head_dim, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write log2 of what each block weighs before the softmax, -inf for an empty one."""
    head = tl.program_id(2).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    in_dim = (dim < head_dim)[None, :]
    in_row, in_column = row < num_q_blocks, column < num_kv_blocks
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    q_ptrs = q_ptr + row.to(tl.int64)[:, None] * stride_qn + dim[None, :]
    k_ptrs = k_ptr + column.to(tl.int64)[:, None] * stride_kn + dim[None, :]
    sample = (tl.arange(0, 16).to(tl.int64) * num_kv_blocks) // 16
    q = tl.load(q_ptrs, in_row[:, None] & in_dim, other=0.0)
    k = tl.load(k_ptrs, in_column[:, None] & in_dim, other=0.0)
    some = tl.load(k_ptr + sample[:, None] * stride_kn + dim[None, :], in_dim, other=0.0)
    offsets_ptr += head * offsets_stride + column
    size = tl.load(offsets_ptr + 1, in_column, other=0) - tl.load(offsets_ptr, in_column, other=0)
    center = tl.sum(some, 0)[None, :] / 16
    logits = tl.dot(q, tl.trans(k - center), input_precision="tf32x3") * scale_log2
    log_size = tl.math.log2(tl.maximum(size, 1).to(tl.float32))
    logits += tl.where(size > 0, log_size, float("-inf"))[None, :]
    out_ptrs = out_ptr + (head * num_q_blocks + row)[:, None] * num_kv_blocks + column[None, :]
    tl.store(out_ptrs, logits, in_row[:, None] & in_column[None, :])


@triton.jit(do_not_specialize=["num_columns"])
def _softmax_rows(x_ptr, num_columns, BLOCK: tl.constexpr):
    """Replace each row of x, in units of log2, by its softmax."""
    x_ptr += tl.program_id(0).to(tl.int64) * num_columns
    column = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_columns, BLOCK):
        x = tl.load(x_ptr + first + column, first + column < num_columns, other=float("-inf"))
        new_peak = tl.maximum(peak, x)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.math.exp2(peak - base) + tl.math.exp2(x - base)
        peak = new_peak
    highest = tl.max(peak, 0)
    total = tl.sum(total * tl.math.exp2(peak - highest), 0)
    for first in range(0, num_columns, BLOCK):
        mask = first + column < num_columns
        x = tl.load(x_ptr + first + column, mask, other=float("-inf"))
        tl.store(x_ptr + first + column, tl.math.exp2(x - highest) / total, mask)


def _forward(q_mean: Tensor, k_mean: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    q_mean, k_mean = (x if x.stride(3) == 1 else x.contiguous() for x in (q_mean, k_mean))
    batch, num_heads, num_q, head_dim = q_mean.shape
    num_kv = k_mean.shape[2]
    score = q_mean.new_empty(batch, num_heads, num_q, num_kv)
    block_d = max(16, power_of_2(head_dim))
    block_m, block_n = (64, 64) if block_d <= 128 else (32, 32)
    with on_device(q_mean.device):
        _block_logits[(ceil_div(num_q, block_m), ceil_div(num_kv, block_n), batch * num_heads)](
            q_mean, k_mean, kv_offsets.contiguous(), score,
            *q_mean.stride()[:3], *k_mean.stride()[:3],
            num_heads, num_q, num_kv, head_stride(kv_offsets), head_dim, scale * _LOG2_E,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        _softmax_rows[(batch * num_heads * num_q,)](score, num_kv, BLOCK=512, num_warps=2)
    return score


def _fake(q_mean: Tensor, k_mean: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    return q_mean.new_empty(*q_mean.shape[:3], k_mean.shape[2])


forward = define_operator("block_score", _forward, _fake)
