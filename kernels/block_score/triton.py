"""Block scores in Triton: one launch, a program computes a few rows whole.

The dot is tf32 in three terms, which keeps fp32 accuracy. It runs on k_mean minus the mean of 16
of its blocks: any key would cancel in the softmax, so a sample serves as well as all of them. The
logits, in units of log2, pass through the output, which stays in the L2 cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import ceil_div, define_operator, on_device, power_of_2
from ..blocks import head_stride

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_heads", "num_q_blocks", "num_kv_blocks", "offsets_stride"])
def _block_score_fwd(
    q_ptr, k_ptr, offsets_ptr, out_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    num_heads, num_q_blocks, num_kv_blocks, offsets_stride, head_dim, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    in_dim = (dim < head_dim)[None, :]
    in_row = (row < num_q_blocks)[:, None]
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_ptrs + dim[None, :], in_row & in_dim, other=0.0)
    k_ptr += b * stride_kb + h * stride_kh
    offsets_ptr += head * offsets_stride
    sample = (tl.arange(0, 16).to(tl.int64) * num_kv_blocks) // 16
    some = tl.load(k_ptr + sample[:, None] * stride_kn + dim[None, :], in_dim, other=0.0)
    center = tl.sum(some, 0)[None, :] / 16
    k_ptrs = k_ptr + column.to(tl.int64)[:, None] * stride_kn + dim[None, :]
    out_ptrs = out_ptr + (head * num_q_blocks + row)[:, None] * num_kv_blocks + column[None, :]

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, num_kv_blocks, BLOCK_N):
        in_column = first + column < num_kv_blocks
        k = tl.load(
            k_ptrs + tl.cast(first, tl.int64) * stride_kn, in_column[:, None] & in_dim, other=0.0
        )
        start = tl.load(offsets_ptr + first + column, in_column, other=0)
        size = tl.load(offsets_ptr + first + column + 1, in_column, other=0) - start
        logits = tl.dot(q, tl.trans(k - center), input_precision="tf32x3") * scale_log2
        log_size = tl.math.log2(tl.maximum(size, 1).to(tl.float32))
        logits += tl.where(size > 0, log_size, float("-inf"))[None, :]
        tl.store(out_ptrs + first, logits, in_row & in_column[None, :])
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.math.exp2(peak - base)
        total += tl.sum(tl.math.exp2(logits - base[:, None]), 1)
        peak = new_peak

    tl.debug_barrier()  # other threads of the program wrote what is read below
    for first in range(0, num_kv_blocks, BLOCK_N):
        mask = in_row & (first + column < num_kv_blocks)[None, :]
        logits = tl.load(out_ptrs + first, mask, other=float("-inf"))
        tl.store(out_ptrs + first, tl.math.exp2(logits - peak[:, None]) / total[:, None], mask)


def _forward(q_mean: Tensor, k_mean: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    q_mean, k_mean = (x if x.stride(3) == 1 else x.contiguous() for x in (q_mean, k_mean))
    batch, num_heads, num_q, head_dim = q_mean.shape
    num_kv = k_mean.shape[2]
    score = q_mean.new_empty(batch, num_heads, num_q, num_kv)
    block_d = max(16, power_of_2(head_dim))
    # More rows read k_mean less often, but leave an H100's 132 SMs without work if there are few.
    is_large = block_d <= 128 and ceil_div(num_q, 32) * batch * num_heads >= 132
    block_m, block_n = 32 if is_large else 16, 64 if block_d <= 128 else 32
    with on_device(q_mean.device):
        _block_score_fwd[(ceil_div(num_q, block_m), batch * num_heads)](
            q_mean, k_mean, kv_offsets.contiguous(), score,
            *q_mean.stride()[:3], *k_mean.stride()[:3],
            num_heads, num_q, num_kv, head_stride(kv_offsets), head_dim, scale * _LOG2_E,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=1,
        )  # fmt: skip
    return score


def _fake(q_mean: Tensor, k_mean: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    return q_mean.new_empty(*q_mean.shape[:3], k_mean.shape[2])


forward = define_operator("block_score", _forward, _fake)
