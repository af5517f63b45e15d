"""Block errors in Triton: a program takes a tile of mean queries through some of the kv blocks.

All weights are relative to e^peak, the largest logit of the row in the block so far, in units of
log2. The change of the weights is rounded to v's type for the dot with v, and its sum is taken of
the rounded numbers, so that values common to a block cancel whatever the rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import ceil_div, define_operator, on_device, power_of_2, unit_inner_stride

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_RUN_TIME = ["num_heads", "num_q_blocks", "num_kv_blocks", "stride_offsets", "blocks_each"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_error_fwd(
    q_ptr, k_ptr, v_ptr, logits_ptr, v_mean_ptr, center_ptr, offsets_ptr, error_ptr, sum_ptr,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    num_heads, num_q_blocks, num_kv_blocks, stride_offsets, blocks_each, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OF_OUTPUT: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = row < num_q_blocks
    dim, column = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N)
    at = (head * num_q_blocks + row)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + at, in_row[:, None], other=0.0)
    if OF_OUTPUT:
        center = tl.load(center_ptr + at, in_row[:, None], other=0.0)
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + column[:, None] * stride_ks + dim[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + column[:, None] * stride_vs + dim[None, :]
    offsets_ptr += head * stride_offsets
    v_mean_ptr += head * num_kv_blocks * HEAD_DIM
    pairs = (head * num_q_blocks + row) * num_kv_blocks

    first = tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, num_kv_blocks)):
        start = tl.load(offsets_ptr + block).to(tl.int64)
        size = (tl.load(offsets_ptr + block + 1) - start).to(tl.int32)
        pooled = tl.load(logits_ptr + pairs + block, in_row, other=0.0) * _LOG2_E
        peak = pooled
        total = tl.zeros([BLOCK_M], tl.float32)
        error = tl.zeros([BLOCK_M], tl.float32)
        shift = tl.zeros([BLOCK_M], tl.float32)
        moved = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        if not OF_OUTPUT:
            v_mean = tl.load(v_mean_ptr + block * HEAD_DIM + dim)
        for tile in range(0, BLOCK_N if ONE_TILE else size, BLOCK_N):
            in_block = tile + column < size
            place = start + tile
            k = tl.load(k_ptrs + place * stride_ks, in_block[:, None], other=0.0)
            v = tl.load(v_ptrs + place * stride_vs, in_block[:, None], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            s = tl.where(in_block[None, :], s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            fade = tl.math.exp2(peak - new_peak)
            peak = new_peak
            weight = tl.math.exp2(s - peak[:, None])
            centroid = tl.math.exp2(pooled - peak)
            change = tl.where(in_block[None, :], weight - centroid[:, None], 0.0)
            total = total * fade + tl.sum(weight, 1)
            if OF_OUTPUT:
                rounded = change.to(v.dtype)
                shift = shift * fade + tl.sum(rounded.to(tl.float32), 1)
                moved = tl.dot(rounded, v, moved * fade[:, None], input_precision="ieee")
            else:
                v = v.to(tl.float32)
                spread = tl.where(in_block[:, None], v - v_mean[None, :], 0.0)
                own, cross = tl.sum(v * v, 1), 2 * tl.sum(v * spread, 1)
                rest = tl.sum(spread * spread, 1)
                squares = change * change * own[None, :] + (
                    change * centroid[:, None] * cross[None, :]
                    + (centroid * centroid)[:, None] * rest[None, :]
                )
                error = error * fade * fade + tl.sum(tl.maximum(squares, 0.0), 1)
        if OF_OUTPUT:
            moved -= shift[:, None] * center
            error = tl.sum(moved * moved, 1)
        # log2(0) is -inf: no error, or no key.
        log_error = (2 * peak + tl.math.log2(error)) * _LN_2
        tl.store(error_ptr + pairs + block, log_error, in_row)
        tl.store(sum_ptr + pairs + block, (peak + tl.math.log2(total)) * _LN_2, in_row)


_PROGRAMS = 264  # two for each multiprocessor of an H100


def _forward(
    q_mean: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor,
    v_mean: Tensor,
    center: Tensor,
    offsets: Tensor,
    of_output: bool,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    k, v = unit_inner_stride(k), unit_inner_stride(v)
    q_mean, logits, v_mean, center = (x.contiguous() for x in (q_mean, logits, v_mean, center))
    batch, num_heads, num_q, head_dim = q_mean.shape
    num_kv = logits.shape[3]
    log_error, log_sum = torch.empty_like(logits), torch.empty_like(logits)
    is_half = k.element_size() == 2
    block_m = min(max(power_of_2(num_q), 16), 64 if is_half else 16)
    block_n = 64 if is_half else 32
    tiles = ceil_div(num_q, block_m) * batch * num_heads
    parts = min(max(1, _PROGRAMS // tiles), num_kv)
    with on_device(k.device):
        _block_error_fwd[(ceil_div(num_q, block_m), parts, batch * num_heads)](
            q_mean, k, v, logits, v_mean, center, offsets.contiguous(), log_error, log_sum,
            *k.stride()[:3], *v.stride()[:3],
            num_heads, num_q, num_kv, 0 if offsets.ndim == 1 else num_kv + 1,
            ceil_div(num_kv, parts), scale * _LOG2_E.value,
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
            OF_OUTPUT=of_output, ONE_TILE=block_size <= block_n,
            num_warps=4, num_stages=2 if is_half else 1,
        )  # fmt: skip
    return log_error, log_sum


def _fake(
    q_mean: Tensor, k: Tensor, v: Tensor, logits: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(logits)


forward = define_operator("block_error", _forward, _fake)
