"""Quantised block-sparse attention in Triton, formulas in reference.py: two kernels, then one.

The means of a sample of the tokens come first; then one program per kv block smooths, rounds and
stores its keys, and its values transposed: the low-precision tensor core instructions want both
operands with the summed dimension innermost. The attention rounds its own queries, one scale a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device, unit_inner_stride
from ..blocks import Blocks
from ..quantized import MAX_SAMPLE, MIN_SCALE, PEAK_EXPONENT, Quantized, sample_step

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_PEAK_EXPONENT = tl.constexpr(PEAK_EXPONENT)
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # the sum's low bits are the rounded number

_SAMPLE_PARTS = 8
_RUN_TIME = ["num_heads", "num_q", "num_kv", "num_q_blocks", "num_kv_blocks", "sample", "step"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _sample_sums(
    k_ptr, v_ptr, sums_ptr,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    num_heads, num_kv, sample, step,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum ROWS tokens of the sample, [B, H, parts, 2, D]: keys and values."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    dim = tl.arange(0, HEAD_DIM)
    i = part * ROWS + tl.arange(0, ROWS)
    present = (i < sample)[:, None]
    token = (i.to(tl.int64) * step) % num_kv
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + token[:, None] * stride_ks + dim[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + token[:, None] * stride_vs + dim[None, :]
    k = tl.load(k_ptrs, mask=present, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=present, other=0.0).to(tl.float32)
    sums_ptr += (head * tl.num_programs(0) + part) * (2 * HEAD_DIM) + dim
    tl.store(sums_ptr, tl.sum(k, 0))
    tl.store(sums_ptr + HEAD_DIM, tl.sum(v, 0))


@triton.jit
def _mean(sums_ptr, sample, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + part[:, None] * (2 * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :])
    return tl.sum(sums, 0) / sample


@triton.jit
def _round(x, scale, INT8: tl.constexpr):
    scaled = x * (1.0 / scale)
    if INT8:
        return (scaled + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return scaled.to(tl.float8e4nv)


@triton.jit(do_not_specialize=_RUN_TIME)
def _quantize(
    k_ptr, v_ptr, offsets_ptr, sums_ptr,
    k8_ptr, k_scale_ptr, k_mean_ptr, v8_ptr, v_exponent_ptr, v_mean_ptr,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    num_heads, num_kv_blocks, sample,
    HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    INT8: tl.constexpr, FP8_PV: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    start = tl.load(offsets_ptr + block)
    rows = tl.load(offsets_ptr + block + 1) - start
    slab = head * num_kv_blocks + block
    dim = tl.arange(0, HEAD_DIM)
    slot = tl.arange(0, SLOTS)
    sums_ptr += head * (PARTS * 2 * HEAD_DIM)

    mean = _mean(sums_ptr, sample, HEAD_DIM, PARTS)
    if block == 0:
        tl.store(k_mean_ptr + head * HEAD_DIM + dim, mean)
    token = (start + slot).to(tl.int64)[:, None]
    present = (slot < rows)[:, None]
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + token * stride_ks + dim[None, :]
    k = tl.load(k_ptrs, mask=present, other=0.0).to(tl.float32)
    k = tl.where(present, k - mean[None, :], 0.0)
    limit: tl.constexpr = 127.0 if INT8 else 448.0
    scale = tl.maximum(tl.max(tl.abs(k)) * (1.0 / limit), _MIN_SCALE)
    tl.store(k_scale_ptr + slab, scale)
    slots = slab * (SLOTS * HEAD_DIM) + slot[:, None] * HEAD_DIM + dim[None, :]
    tl.store(k8_ptr + slots, _round(k, scale, INT8))

    if FP8_PV:
        mean = _mean(sums_ptr + HEAD_DIM, sample, HEAD_DIM, PARTS)
        if block == 0:
            tl.store(v_mean_ptr + head * HEAD_DIM + dim, mean)
        # The tokens in slot_order: rows are read in another order, not moved.
        ordered = slot // 16 * 16 + slot % 4 // 2 * 8 + slot % 16 // 4 * 2 + slot % 2
        token = (start + ordered).to(tl.int64)[:, None]
        present = (ordered < rows)[:, None]
        v_ptrs = v_ptr + b * stride_vb + h * stride_vh + token * stride_vs + dim[None, :]
        v = tl.load(v_ptrs, mask=present, other=0.0).to(tl.float32)
        v = tl.where(present, v - mean[None, :], 0.0)
        largest = tl.maximum(tl.max(tl.abs(v)) * (1.0 / 448.0), _MIN_SCALE)
        bits = largest.to(tl.int32, bitcast=True)
        exponent = ((bits + 0x7FFFFF) >> 23) - 127  # ceil(log2(largest))
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(v_exponent_ptr + slab, exponent.to(tl.float32))
        v8 = (v * inverse).to(tl.float8e4nv)
        slots = slab * (SLOTS * HEAD_DIM) + dim[:, None] * SLOTS + slot[None, :]
        tl.store(v8_ptr + slots, tl.trans(v8))
    else:
        tl.store(v_exponent_ptr + slab, 0.0)
        if block == 0:
            tl.store(v_mean_ptr + head * HEAD_DIM + dim, tl.zeros([HEAD_DIM], tl.float32))


@triton.jit(do_not_specialize=_RUN_TIME)
def _quantized_attention_fwd(
    q_ptr, k8_ptr, k_scale_ptr, k_mean_ptr, v_ptr, v_exponent_ptr, v_mean_ptr, out_ptr, lse_ptr,
    num_blocks_ptr, indices_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    num_heads, num_q, num_q_blocks, num_kv_blocks, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    PARTS_M: tl.constexpr, EVEN_KV: tl.constexpr, INT8: tl.constexpr, FP8_PV: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // PARTS_M
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_start = tl.load(q_offsets_ptr + q_block) + tl.program_id(0) % PARTS_M * BLOCK_M
    q_rows = tl.load(q_offsets_ptr + q_block + 1) - q_start
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    token = q_start.to(tl.int64) + row
    present = (row < q_rows)[:, None]
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + dim[None, :]
    q = tl.load(q_ptrs, mask=present, other=0.0).to(tl.float32)
    k_mean = tl.load(k_mean_ptr + head * HEAD_DIM + dim)
    shift = tl.sum(q * k_mean[None, :], 1) * scale
    limit: tl.constexpr = 127.0 if INT8 else 448.0
    q_scale = tl.maximum(tl.max(tl.abs(q), 1) * (1.0 / limit), _MIN_SCALE)
    q8 = _round(q, q_scale[:, None], INT8)
    factor = q_scale * (scale * _LOG2_E)

    slab = head * num_kv_blocks
    k8_ptr += slab * (SLOTS * HEAD_DIM) + column[:, None] * HEAD_DIM + dim[None, :]
    if FP8_PV:
        v_ptr += slab * (SLOTS * HEAD_DIM) + dim[:, None] * SLOTS + column[None, :]
    else:
        v_ptr += b * stride_vb + h * stride_vh
        v_ptr += column.to(tl.int64)[:, None] * stride_vs + dim[None, :]
    k_scale_ptr += slab
    v_exponent_ptr += slab
    list_row = head * num_q_blocks + q_block
    indices_ptr += list_row * num_kv_blocks
    PARTS_N: tl.constexpr = SLOTS // BLOCK_N
    num_tiles = tl.load(num_blocks_ptr + list_row) * PARTS_N
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2, whole numbers
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        kv_block = tl.load(indices_ptr + i // PARTS_N)
        first = i % PARTS_N * BLOCK_N
        at = kv_block.to(tl.int64) * (SLOTS * HEAD_DIM)
        k8 = tl.load(k8_ptr + at + first * HEAD_DIM)
        k_scale = tl.load(k_scale_ptr + kv_block)
        logits = tl.dot(q8, tl.trans(k8)).to(tl.float32)
        if not EVEN_KV:
            kv_start = tl.load(kv_offsets_ptr + kv_block)
            kv_rows = tl.load(kv_offsets_ptr + kv_block + 1) - kv_start - first
            if kv_rows < BLOCK_N:
                logits = tl.where((column < kv_rows)[None, :], logits, float("-inf"))
        step = factor * k_scale
        highest = tl.max(logits, 1) * step
        if FP8_PV:
            v_exponent = tl.load(v_exponent_ptr + kv_block)
            new_peak = tl.maximum(peak, tl.ceil(highest + v_exponent))
            base = new_peak - (v_exponent + _PEAK_EXPONENT)
        else:
            new_peak = tl.maximum(peak, tl.ceil(highest))
            base = new_peak
        decay = tl.math.exp2(peak - new_peak)
        if not EVEN_KV:  # no key so far: keep -inf - (-inf) out of exp2
            is_empty = new_peak == float("-inf")
            base = tl.where(is_empty, 0.0, base)
            decay = tl.where(is_empty, 0.0, decay)
        prob = tl.math.exp2(logits * step[:, None] - base[:, None])
        if FP8_PV:
            total = total * decay + tl.sum(prob, 1) * tl.math.exp2(-v_exponent)
            weight = prob.to(tl.float8e4nv)
            weight = tl.reshape(weight, (BLOCK_M, BLOCK_N // 16, 2, 4, 2))  # slot_order
            weight = tl.reshape(tl.permute(weight, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
            v8 = tl.load(v_ptr + at + first)
            # The tensor cores keep some 14 bits of a running fp8 sum: no longer than one tile.
            acc = acc * decay[:, None] + tl.dot(weight, tl.trans(v8))
        else:
            total = total * decay + tl.sum(prob, 1)
            acc = acc * decay[:, None]
            v_ptrs = v_ptr + (tl.load(kv_offsets_ptr + kv_block) + first).to(tl.int64) * stride_vs
            if EVEN_KV:
                v = tl.load(v_ptrs)
            else:
                v = tl.load(v_ptrs, mask=(column < kv_rows)[:, None], other=0.0)
            acc = tl.dot(prob.to(v.dtype), v, acc)
        peak = new_peak

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    out = acc / total[:, None]
    lse = tl.math.log2(total)
    if FP8_PV:
        v_mean = tl.load(v_mean_ptr + head * HEAD_DIM + dim)
        out += tl.where(is_empty[:, None], 0.0, v_mean[None, :])
        lse -= _PEAK_EXPONENT
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_os + dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=present)
    tl.store(lse_ptr + head * num_q + token, (peak + lse) * _LN_2 + shift, mask=row < q_rows)


class _Tiles(NamedTuple):
    rows: int  # queries of a block that one program computes, at most
    columns: int  # key slots it meets at a time, at most
    warps_per_64_rows: int
    num_stages: int


_FWD = _Tiles(128, 64, 4, 3)


def empty_quantized(
    k: Tensor, kv_offsets: Tensor, kv_block_size: int, qk: str, pv: str
) -> tuple[Tensor, ...]:
    """Allocate what `quantize` fills."""
    batch, heads, _, head_dim = k.shape
    num_blocks, slots = kv_offsets.shape[0] - 1, max(32, triton.next_power_of_2(kv_block_size))
    dtype = torch.int8 if qk == "int8" else torch.float8_e4m3fn
    k8 = k.new_empty(batch, heads, num_blocks, slots, head_dim, dtype=dtype)
    v_slots = slots if pv == "fp8" else 0
    v8 = k.new_empty(batch, heads, num_blocks, head_dim, v_slots, dtype=torch.float8_e4m3fn)
    k_scale = k.new_empty(batch, heads, num_blocks, dtype=torch.float32)
    k_mean = k.new_empty(batch, heads, head_dim, dtype=torch.float32)
    return k8, k_scale, k_mean, v8, torch.empty_like(k_scale), torch.empty_like(k_mean)


def quantize(
    k: Tensor, v: Tensor, kv_offsets: Tensor, kv_block_size: int, qk: str, pv: str
) -> tuple[Tensor, ...]:
    """Return the tensors of a Quantized record, its v empty where pv is "none"."""
    k, v = unit_inner_stride(k), unit_inner_stride(v)
    results = empty_quantized(k, kv_offsets, kv_block_size, qk, pv)
    batch, heads, num_kv, head_dim = k.shape
    num_blocks = kv_offsets.shape[0] - 1
    sample = min(num_kv, MAX_SAMPLE)
    sums = k.new_empty(batch * heads, _SAMPLE_PARTS, 2, head_dim, dtype=torch.float32)
    with on_device(k.device):
        _sample_sums[(_SAMPLE_PARTS, batch * heads)](
            k, v, sums, *k.stride()[:3], *v.stride()[:3],
            heads, num_kv, sample, sample_step(num_kv),
            HEAD_DIM=head_dim, ROWS=MAX_SAMPLE // _SAMPLE_PARTS,
        )  # fmt: skip
        _quantize[(num_blocks, batch * heads)](
            k, v, kv_offsets, sums, *results, *k.stride()[:3], *v.stride()[:3],
            heads, num_blocks, sample,
            HEAD_DIM=head_dim, SLOTS=results[0].shape[3], PARTS=_SAMPLE_PARTS,
            INT8=qk == "int8", FP8_PV=pv == "fp8", num_warps=results[0].shape[3] // 16,
        )  # fmt: skip
    return results


def forward(q: Tensor, quantized: Quantized, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D], strided like q, and lse [B, H, Sq] in fp32."""
    q, v = unit_inner_stride(q), unit_inner_stride(quantized.v)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    num_q_blocks, num_kv_blocks = blocks.kv_indices.shape[2:]
    padded = max(64, triton.next_power_of_2(blocks.q_block_size))
    rows, slots = min(padded, _FWD.rows), quantized.k.shape[3]
    with on_device(q.device):
        _quantized_attention_fwd[(num_q_blocks * (padded // rows), q.shape[0] * q.shape[1])](
            q, quantized.k, quantized.k_scale, quantized.k_mean,
            v, quantized.v_exponent, quantized.v_mean, out, lse,
            blocks.kv_num_blocks, blocks.kv_indices, blocks.q_offsets, blocks.kv_offsets,
            *q.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            q.shape[1], q.shape[2], num_q_blocks, num_kv_blocks, scale,
            HEAD_DIM=q.shape[3], BLOCK_M=rows, BLOCK_N=min(slots, _FWD.columns), SLOTS=slots,
            PARTS_M=padded // rows, EVEN_KV=quantized.num_tokens == num_kv_blocks * slots,
            INT8=quantized.k.dtype == torch.int8, FP8_PV=v.dtype == torch.float8_e4m3fn,
            num_warps=_FWD.warps_per_64_rows * rows // 64, num_stages=_FWD.num_stages,
        )  # fmt: skip
    return out, lse
