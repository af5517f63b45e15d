"""Block-sparse attention in Triton: forward, dQ and dK/dV.

With c = scale * log2(e) and the lse of the forward, both directions compute the logits alike: raw
operands, fp32, scaled after the dot.
    P = exp2(c * q k^T - lse * log2(e))        D = rowsum(dO * O) - dLSE
    dV = P^T dO     dS = P * (dO V^T - D)      dQ = scale * dS K     dK = scale * dS^T Q
dQ walks the kv blocks of its q block, dK/dV the q blocks of its kv block: no atomics, so the
results are the same every time. P and dS are rounded to the input type for their second dot;
nothing else is rounded before the outputs. A program owns at most `own` rows of one block and meets
the other side's blocks `step` rows at a time; rows past the end of a block are masked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..blocks import Blocks

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Lengths and counts change from call to call; specialising on them would compile again.
_RUN_TIME = ["num_heads", "num_q", "num_q_blocks", "num_kv_blocks"]


@triton.jit
def _tile(offsets_ptr, block, part, BLOCK: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """Return the first token of a tile and how many of its BLOCK rows are tokens of the block."""
    if EVEN:
        return (block * PARTS + part) * BLOCK, BLOCK
    start = tl.load(offsets_ptr + block) + part * BLOCK
    return start, tl.load(offsets_ptr + block + 1) - start


@triton.jit
def _load_rows(ptrs, row, rows, EVEN: tl.constexpr):
    """Load a tile of rows; rows past the end of the block are 0."""
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(row < rows)[:, None], other=0.0)


@triton.jit
def _load_row_scalars(ptrs, row, rows, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=row < rows, other=0.0)


@triton.jit
def _store_rows(ptrs, value, row, rows, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    num_blocks_ptr, indices_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    num_heads, num_q, num_q_blocks, num_kv_blocks, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // PARTS_M
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_start, q_rows = _tile(
        q_offsets_ptr, q_block, tl.program_id(0) % PARTS_M, BLOCK_M, PARTS_M, EVEN_Q
    )
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    q_start = q_start.to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + q_start * stride_qs
    q = _load_rows(
        q_ptrs + row.to(tl.int64)[:, None] * stride_qs + dim[None, :], row, q_rows, EVEN_Q
    )
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh
    k_ptrs += column.to(tl.int64)[:, None] * stride_ks + dim[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh
    v_ptrs += column.to(tl.int64)[:, None] * stride_vs + dim[None, :]

    list_row = head * num_q_blocks + q_block
    num_tiles = tl.load(num_blocks_ptr + list_row) * PARTS_N
    indices_ptr += list_row * num_kv_blocks
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        kv_block = tl.load(indices_ptr + i // PARTS_N)
        kv_start, kv_rows = _tile(kv_offsets_ptr, kv_block, i % PARTS_N, BLOCK_N, PARTS_N, EVEN_KV)
        kv_start = kv_start.to(tl.int64)
        k = _load_rows(k_ptrs + kv_start * stride_ks, column, kv_rows, EVEN_KV)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if EVEN_KV:
            new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
            base = new_peak
        else:
            logits = tl.where((column < kv_rows)[None, :], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
            # A tile past the end of its block has no key: keep -inf - (-inf) out of exp2.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = tl.math.exp2(logits * scale_log2 - base[:, None])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(prob, 1)
        acc = acc * decay[:, None]
        v = _load_rows(v_ptrs + kv_start * stride_vs, column, kv_rows, EVEN_KV)
        acc = tl.dot(prob.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak

    total = tl.where(total == 0.0, 1.0, total)  # no key: out 0, and lse = peak = -inf
    out = acc / total[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + q_start * stride_os
    out_ptrs += row.to(tl.int64)[:, None] * stride_os + dim[None, :]
    _store_rows(out_ptrs, out.to(out_ptr.dtype.element_ty), row, q_rows, EVEN_Q)
    lse = (peak + tl.math.log2(total)) * _LN_2
    tl.store(lse_ptr + head * num_q + q_start + row, lse, mask=row < q_rows)


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, dq_ptr, lse_ptr, grad_lse_ptr, delta_ptr,
    num_blocks_ptr, indices_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    stride_dqb, stride_dqh, stride_dqs,
    num_heads, num_q, num_q_blocks, num_kv_blocks, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; also writes D for the dK/dV kernel, which runs after it."""
    q_block = tl.program_id(0) // PARTS_M
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_start, q_rows = _tile(
        q_offsets_ptr, q_block, tl.program_id(0) % PARTS_M, BLOCK_M, PARTS_M, EVEN_Q
    )
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    q_start = q_start.to(tl.int64)
    token = q_start + row  # int64
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + dim[None, :]
    q = _load_rows(q_ptrs, row, q_rows, EVEN_Q)
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh + token[:, None] * stride_gs
    grad = _load_rows(grad_ptrs + dim[None, :], row, q_rows, EVEN_Q)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_os
    out = _load_rows(out_ptrs + dim[None, :], row, q_rows, EVEN_Q)
    at = head * num_q + token
    grad_lse = _load_row_scalars(grad_lse_ptr + at, row, q_rows, EVEN_Q)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) - grad_lse
    tl.store(delta_ptr + at, delta, mask=row < q_rows)
    lse = _load_row_scalars(lse_ptr + at, row, q_rows, EVEN_Q) * _LOG2_E
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh
    k_ptrs += column.to(tl.int64)[:, None] * stride_ks + dim[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh
    v_ptrs += column.to(tl.int64)[:, None] * stride_vs + dim[None, :]

    list_row = head * num_q_blocks + q_block
    num_tiles = tl.load(num_blocks_ptr + list_row) * PARTS_N
    indices_ptr += list_row * num_kv_blocks
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        kv_block = tl.load(indices_ptr + i // PARTS_N)
        kv_start, kv_rows = _tile(kv_offsets_ptr, kv_block, i % PARTS_N, BLOCK_N, PARTS_N, EVEN_KV)
        kv_start = kv_start.to(tl.int64)
        k = _load_rows(k_ptrs + kv_start * stride_ks, column, kv_rows, EVEN_KV)
        v = _load_rows(v_ptrs + kv_start * stride_vs, column, kv_rows, EVEN_KV)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        prob = tl.math.exp2(logits * scale_log2 - lse[:, None])
        if not EVEN_KV:  # a key that is not there has logit 0, not -inf
            prob = tl.where((column < kv_rows)[None, :], prob, 0.0)
        dprob = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dlogits = prob * (dprob - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + token[:, None] * stride_dqs + dim[None, :]
    _store_rows(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), row, q_rows, EVEN_Q)


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    num_blocks_ptr, indices_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    num_heads, num_q, num_q_blocks, num_kv_blocks, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; everything is transposed, [BLOCK_N, BLOCK_M].

    Queries past the end of a block load as q = dO = lse = D = 0, so they add exactly 0. A key that
    no query selects gets 0.
    """
    kv_block = tl.program_id(0) // PARTS_N
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    kv_start, kv_rows = _tile(
        kv_offsets_ptr, kv_block, tl.program_id(0) % PARTS_N, BLOCK_N, PARTS_N, EVEN_KV
    )
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    key = kv_start.to(tl.int64) + column
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + key[:, None] * stride_ks + dim[None, :]
    k = _load_rows(k_ptrs, column, kv_rows, EVEN_KV)
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + key[:, None] * stride_vs + dim[None, :]
    v = _load_rows(v_ptrs, column, kv_rows, EVEN_KV)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh
    q_ptrs += row.to(tl.int64)[:, None] * stride_qs + dim[None, :]
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh
    grad_ptrs += row.to(tl.int64)[:, None] * stride_gs + dim[None, :]
    lse_ptrs = lse_ptr + head * num_q + row
    delta_ptrs = delta_ptr + head * num_q + row

    list_row = head * num_kv_blocks + kv_block
    num_tiles = tl.load(num_blocks_ptr + list_row) * PARTS_M
    indices_ptr += list_row * num_q_blocks
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        q_block = tl.load(indices_ptr + i // PARTS_M)
        q_start, q_rows = _tile(q_offsets_ptr, q_block, i % PARTS_M, BLOCK_M, PARTS_M, EVEN_Q)
        q_start = q_start.to(tl.int64)
        q = _load_rows(q_ptrs + q_start * stride_qs, row, q_rows, EVEN_Q)
        grad = _load_rows(grad_ptrs + q_start * stride_gs, row, q_rows, EVEN_Q)
        lse = _load_row_scalars(lse_ptrs + q_start, row, q_rows, EVEN_Q) * _LOG2_E
        delta = _load_row_scalars(delta_ptrs + q_start, row, q_rows, EVEN_Q)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee")
        prob = tl.math.exp2(logits * scale_log2 - lse[None, :])
        dv = tl.dot(prob.to(grad.dtype), grad, dv, input_precision="ieee")
        dprob = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dlogits = prob * (dprob - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + key[:, None] * stride_dks + dim[None, :]
    _store_rows(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), column, kv_rows, EVEN_KV)
    dv_ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + key[:, None] * stride_dvs + dim[None, :]
    _store_rows(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), column, kv_rows, EVEN_KV)


class _Tiles(NamedTuple):
    own: int  # rows of a block that one program computes, at most
    step: int  # rows of the other side's blocks that it meets at a time, at most
    num_stages: int


# By bytes per element. A tile of over 64 own rows takes 8 warps, a smaller one 4.
_FWD = {2: _Tiles(128, 64, 3), 4: _Tiles(32, 32, 1)}
_BWD_DQ = {2: _Tiles(64, 64, 2), 4: _Tiles(32, 32, 1)}
_BWD_DKV = {2: _Tiles(64, 64, 2), 4: _Tiles(32, 32, 1)}


class _Side(NamedTuple):
    """One side of the block pairs, cut into tiles."""

    tile: int
    parts: int  # tiles a block
    is_even: bool  # every tile is full

    @classmethod
    def cut(cls, num_tokens: int, num_blocks: int, block_size: int, limit: int) -> "_Side":
        padded = max(16, triton.next_power_of_2(block_size))
        tile = min(padded, limit)
        is_even = padded == block_size and num_tokens == num_blocks * block_size
        return cls(tile, padded // tile, is_even)


def _meta(q: Tensor, own: _Side, query: _Side, key: _Side, num_stages: int) -> dict[str, int]:
    return {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_M": query.tile,
        "BLOCK_N": key.tile,
        "PARTS_M": query.parts,
        "PARTS_N": key.parts,
        "EVEN_Q": query.is_even,
        "EVEN_KV": key.is_even,
        "num_warps": 8 if own.tile > 64 else 4,
        "num_stages": num_stages,
    }


def _counts(q: Tensor, blocks: Blocks) -> tuple[int, int, int, int]:
    return q.shape[1], q.shape[2], *blocks.kv_indices.shape[2:]


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D], strided like q, and lse [B, H, Sq], without autograd."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    num_q_blocks, num_kv_blocks = blocks.kv_indices.shape[2:]
    tiles = _FWD[q.element_size()]
    query = _Side.cut(q.shape[2], num_q_blocks, blocks.q_block_size, tiles.own)
    key = _Side.cut(k.shape[2], num_kv_blocks, blocks.kv_block_size, tiles.step)
    with on_device(q.device):
        _block_sparse_attention_fwd[(num_q_blocks * query.parts, q.shape[0] * q.shape[1])](
            q, k, v, out, lse,
            blocks.kv_num_blocks, blocks.kv_indices, blocks.q_offsets, blocks.kv_offsets,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *_counts(q, blocks), scale * _LOG2_E.value,
            **_meta(q, query, query, key, tiles.num_stages),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, strided like q, k, v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    num_q_blocks, num_kv_blocks = blocks.kv_indices.shape[2:]
    num_heads = q.shape[0] * q.shape[1]
    scales = (scale, scale * _LOG2_E.value)
    with on_device(q.device):
        tiles = _BWD_DQ[q.element_size()]
        query = _Side.cut(q.shape[2], num_q_blocks, blocks.q_block_size, tiles.own)
        key = _Side.cut(k.shape[2], num_kv_blocks, blocks.kv_block_size, tiles.step)
        _block_sparse_attention_bwd_dq[(num_q_blocks * query.parts, num_heads)](
            q, k, v, out, grad_out, dq, lse, grad_lse, delta,
            blocks.kv_num_blocks, blocks.kv_indices, blocks.q_offsets, blocks.kv_offsets,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *out.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
            *_counts(q, blocks), *scales,
            **_meta(q, query, query, key, tiles.num_stages),
        )  # fmt: skip
        tiles = _BWD_DKV[q.element_size()]
        query = _Side.cut(q.shape[2], num_q_blocks, blocks.q_block_size, tiles.step)
        key = _Side.cut(k.shape[2], num_kv_blocks, blocks.kv_block_size, tiles.own)
        _block_sparse_attention_bwd_dkv[(num_kv_blocks * key.parts, num_heads)](
            q, k, v, grad_out, dk, dv, lse, delta,
            blocks.q_num_blocks, blocks.q_indices, blocks.q_offsets, blocks.kv_offsets,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *grad_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *_counts(q, blocks), *scales,
            **_meta(q, key, query, key, tiles.num_stages),
        )  # fmt: skip
    return dq, dk, dv
