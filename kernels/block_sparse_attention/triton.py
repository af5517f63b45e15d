"""Block-sparse attention in Triton: forward, dQ and dK/dV.

With c = scale * log2(e) and the lse of the forward, both directions compute the logits alike: raw
operands, fp32, scaled after the dot.
    P = exp2(c * q k^T - lse * log2(e))        D = rowsum(dO * O) - dLSE
    dV = P^T dO     dS = P * (dO V^T - D)      dQ = scale * dS K     dK = scale * dS^T Q
dQ walks the kv blocks of its q block, dK/dV the q blocks of its kv block: no atomics, so the
results are the same every time. P and dS are rounded to the input type for their second dot;
nothing else is rounded before the outputs. A program owns at most `own` rows of one block and meets
the other side's blocks `step` rows at a time; rows past the end of a block are masked. Blocks of up
to 128 tokens are cut into a fixed number of tiles. Larger ones, and those whose size the host does
not know, are cut by the tables of ragged.py: GROUP, 0 otherwise, is the length of their groups.
FILTER makes the forward skip P V of tiles far below the running maximum, and count them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device, unit_inner_stride
from ..blocks import Blocks, head_stride
from ..ragged import (
    MAX_BLOCK,
    gathered,
    heads_at_once,
    of_heads,
    own_tile,
    slots_of_list,
    tables,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Lengths and counts change from call to call; specialising on them would compile again.
_RUN_TIME = [
    "num_heads", "num_q", "num_lists", "list_stride", "q_offsets_stride", "kv_offsets_stride",
]  # fmt: skip


@triton.jit
def _tile(offsets_ptr, block, part, BLOCK: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """Return the first token of a tile and how many of its BLOCK rows are tokens of the block."""
    if EVEN:
        return (block * PARTS + part) * BLOCK, BLOCK
    start = tl.load(offsets_ptr + block) + part * BLOCK
    return start, tl.load(offsets_ptr + block + 1) - start


@triton.jit
def _own(
    tiles_ptr, offsets_ptr, head,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return block, first token and number of rows of the tile that this program owns."""
    if GROUP > 0:
        return own_tile(tiles_ptr, offsets_ptr, head)
    else:
        block = tl.program_id(0) // PARTS
        start, rows = _tile(offsets_ptr, block, tl.program_id(0) % PARTS, BLOCK, PARTS, EVEN)
        return block, start, rows


@triton.jit
def _other(
    list_ptr, offsets_ptr, i, row,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return the first token of tile i of a list (gathered: of each row), and which rows exist."""
    if GROUP > 0:
        return gathered(list_ptr, i, row, BLOCK, GROUP)
    else:
        block = tl.load(list_ptr + i // PARTS)
        start, rows = _tile(offsets_ptr, block, i % PARTS, BLOCK, PARTS, EVEN)
        return start.to(tl.int64), row < rows


@triton.jit
def _row_ptrs(ptr, row, stride, dim, GROUP: tl.constexpr):
    """Return pointers to the rows of a tile that starts at token 0, or of one row for gathering."""
    if GROUP > 0:
        return ptr + dim[None, :]
    else:
        return ptr + (row.to(tl.int64)[:, None] * stride + dim[None, :])


@triton.jit
def _shift(start, stride, GROUP: tl.constexpr):
    if GROUP > 0:
        return start[:, None] * stride
    else:
        return start * stride


@triton.jit
def _load_rows(ptrs, exists, EVEN: tl.constexpr):
    """Load a tile of rows; rows past the end of the block are 0."""
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=exists[:, None], other=0.0)


@triton.jit
def _load_row_scalars(ptrs, exists, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=exists, other=0.0)


@triton.jit
def _store_rows(ptrs, value, exists, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=exists[:, None])


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    num_blocks_ptr, indices_ptr, tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    num_heads, num_q, num_lists, list_stride, q_offsets_stride, kv_offsets_stride,
    scale_log2, skip_below_ptr, met_ptr, kept_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
    GROUP: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_offsets_ptr += head * q_offsets_stride
    kv_offsets_ptr += head * kv_offsets_stride
    q_block, q_start, q_rows = _own(tiles_ptr, q_offsets_ptr, head, BLOCK_M, PARTS_M, EVEN_Q, GROUP)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    in_q = row < q_rows
    q_start = q_start.to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + q_start * stride_qs
    q = _load_rows(q_ptrs + row.to(tl.int64)[:, None] * stride_qs + dim[None, :], in_q, EVEN_Q)
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh
    k_ptrs = _row_ptrs(k_ptrs, column, stride_ks, dim, GROUP)
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh
    v_ptrs = _row_ptrs(v_ptrs, column, stride_vs, dim, GROUP)

    at_list = head * num_lists + q_block
    num_tiles = tl.load(num_blocks_ptr + at_list) * PARTS_N
    if GROUP > 0:
        num_tiles = tl.where(q_rows > 0, num_tiles, 0)
    indices_ptr += at_list * list_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    if FILTER:
        skip_below = tl.load(skip_below_ptr + h) * _LOG2_E
        met = tl.zeros([], tl.int32)
        kept = tl.zeros([], tl.int32)
    for i in range(num_tiles):
        kv_start, in_kv = _other(
            indices_ptr, kv_offsets_ptr, i, column, BLOCK_N, PARTS_N, EVEN_KV, GROUP
        )
        k = _load_rows(k_ptrs + _shift(kv_start, stride_ks, GROUP), in_kv, EVEN_KV)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if EVEN_KV:
            new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
            base = new_peak
        else:
            logits = tl.where(in_kv[None, :], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
            # A tile past the end of its block has no key: keep -inf - (-inf) out of exp2.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = tl.math.exp2(logits * scale_log2 - base[:, None])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(prob, 1)
        acc = acc * decay[:, None]
        if FILTER:
            local = tl.where(in_q, tl.max(logits, 1) * scale_log2, float("-inf"))
            is_met = tl.max(local, 0) > float("-inf")
            # A fused multiply-add would give the maximum itself a gap of a rounding error.
            gap = tl.where(local >= base, 0.0, local - base)
            is_kept = tl.max(gap, 0) >= skip_below
            met += is_met.to(tl.int32)
            kept += (is_met & is_kept).to(tl.int32)
            if is_kept:
                v = _load_rows(v_ptrs + _shift(kv_start, stride_vs, GROUP), in_kv, EVEN_KV)
                acc = tl.dot(prob.to(v.dtype), v, acc, input_precision="ieee")
        else:
            v = _load_rows(v_ptrs + _shift(kv_start, stride_vs, GROUP), in_kv, EVEN_KV)
            acc = tl.dot(prob.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak

    if FILTER:
        program = head * tl.num_programs(0) + tl.program_id(0)
        tl.store(met_ptr + program, met)
        tl.store(kept_ptr + program, kept)
    total = tl.where(total == 0.0, 1.0, total)  # no key: out 0, and lse = peak = -inf
    out = acc / total[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + q_start * stride_os
    out_ptrs += row.to(tl.int64)[:, None] * stride_os + dim[None, :]
    _store_rows(out_ptrs, out.to(out_ptr.dtype.element_ty), in_q, EVEN_Q)
    lse = (peak + tl.math.log2(total)) * _LN_2
    tl.store(lse_ptr + head * num_q + q_start + row, lse, mask=in_q)


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, dq_ptr, lse_ptr, grad_lse_ptr, delta_ptr,
    num_blocks_ptr, indices_ptr, tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    stride_dqb, stride_dqh, stride_dqs,
    num_heads, num_q, num_lists, list_stride, q_offsets_stride, kv_offsets_stride,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; also writes D for the dK/dV kernel, which runs after it."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_offsets_ptr += head * q_offsets_stride
    kv_offsets_ptr += head * kv_offsets_stride
    q_block, q_start, q_rows = _own(tiles_ptr, q_offsets_ptr, head, BLOCK_M, PARTS_M, EVEN_Q, GROUP)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    in_q = row < q_rows
    q_start = q_start.to(tl.int64)
    token = q_start + row  # int64
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + dim[None, :]
    q = _load_rows(q_ptrs, in_q, EVEN_Q)
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh + token[:, None] * stride_gs
    grad = _load_rows(grad_ptrs + dim[None, :], in_q, EVEN_Q)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_os
    out = _load_rows(out_ptrs + dim[None, :], in_q, EVEN_Q)
    at = head * num_q + token
    grad_lse = _load_row_scalars(grad_lse_ptr + at, in_q, EVEN_Q)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) - grad_lse
    tl.store(delta_ptr + at, delta, mask=in_q)
    lse = _load_row_scalars(lse_ptr + at, in_q, EVEN_Q) * _LOG2_E
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh
    k_ptrs = _row_ptrs(k_ptrs, column, stride_ks, dim, GROUP)
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh
    v_ptrs = _row_ptrs(v_ptrs, column, stride_vs, dim, GROUP)

    at_list = head * num_lists + q_block
    num_tiles = tl.load(num_blocks_ptr + at_list) * PARTS_N
    if GROUP > 0:
        num_tiles = tl.where(q_rows > 0, num_tiles, 0)
    indices_ptr += at_list * list_stride
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        kv_start, in_kv = _other(
            indices_ptr, kv_offsets_ptr, i, column, BLOCK_N, PARTS_N, EVEN_KV, GROUP
        )
        k = _load_rows(k_ptrs + _shift(kv_start, stride_ks, GROUP), in_kv, EVEN_KV)
        v = _load_rows(v_ptrs + _shift(kv_start, stride_vs, GROUP), in_kv, EVEN_KV)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        prob = tl.math.exp2(logits * scale_log2 - lse[:, None])
        if not EVEN_KV:  # a key that is not there has logit 0, not -inf
            prob = tl.where(in_kv[None, :], prob, 0.0)
        dprob = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dlogits = prob * (dprob - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + token[:, None] * stride_dqs + dim[None, :]
    _store_rows(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), in_q, EVEN_Q)


@triton.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dkv(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    num_blocks_ptr, indices_ptr, tiles_ptr, q_offsets_ptr, kv_offsets_ptr,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    num_heads, num_q, num_lists, list_stride, q_offsets_stride, kv_offsets_stride,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, PARTS_N: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_KV: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; everything is transposed, [BLOCK_N, BLOCK_M].

    Queries past the end of a block load as q = dO = lse = D = 0, so they add exactly 0. A key that
    no query selects gets 0.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_offsets_ptr += head * q_offsets_stride
    kv_offsets_ptr += head * kv_offsets_stride
    kv_block, kv_start, kv_rows = _own(
        tiles_ptr, kv_offsets_ptr, head, BLOCK_N, PARTS_N, EVEN_KV, GROUP
    )
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    in_kv = column < kv_rows
    key = kv_start.to(tl.int64) + column
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + key[:, None] * stride_ks + dim[None, :]
    k = _load_rows(k_ptrs, in_kv, EVEN_KV)
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + key[:, None] * stride_vs + dim[None, :]
    v = _load_rows(v_ptrs, in_kv, EVEN_KV)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh
    q_ptrs = _row_ptrs(q_ptrs, row, stride_qs, dim, GROUP)
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh
    grad_ptrs = _row_ptrs(grad_ptrs, row, stride_gs, dim, GROUP)
    lse_ptrs = lse_ptr + head * num_q
    delta_ptrs = delta_ptr + head * num_q
    if GROUP == 0:
        lse_ptrs += row
        delta_ptrs += row

    at_list = head * num_lists + kv_block
    num_tiles = tl.load(num_blocks_ptr + at_list) * PARTS_M
    if GROUP > 0:
        num_tiles = tl.where(kv_rows > 0, num_tiles, 0)
    indices_ptr += at_list * list_stride
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for i in range(num_tiles):
        q_start, in_q = _other(indices_ptr, q_offsets_ptr, i, row, BLOCK_M, PARTS_M, EVEN_Q, GROUP)
        q = _load_rows(q_ptrs + _shift(q_start, stride_qs, GROUP), in_q, EVEN_Q)
        grad = _load_rows(grad_ptrs + _shift(q_start, stride_gs, GROUP), in_q, EVEN_Q)
        lse = _load_row_scalars(lse_ptrs + q_start, in_q, EVEN_Q) * _LOG2_E
        delta = _load_row_scalars(delta_ptrs + q_start, in_q, EVEN_Q)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee")
        prob = tl.math.exp2(logits * scale_log2 - lse[None, :])
        dv = tl.dot(prob.to(grad.dtype), grad, dv, input_precision="ieee")
        dprob = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dlogits = prob * (dprob - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + key[:, None] * stride_dks + dim[None, :]
    _store_rows(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), in_kv, EVEN_KV)
    dv_ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + key[:, None] * stride_dvs + dim[None, :]
    _store_rows(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), in_kv, EVEN_KV)


class _Tiles(NamedTuple):
    own: int  # rows of a block that one program computes, at most
    step: int  # rows of the other side's blocks that it meets at a time, at most
    num_stages: int
    group: int = 0  # rows of a block that stay together in a gathered tile, at most


# By bytes per element. A tile of over 64 own rows takes 8 warps, a smaller one 4.
_FWD = {2: _Tiles(128, 64, 3), 4: _Tiles(32, 32, 1)}
_FILTERED_FWD = {2: _Tiles(64, 64, 3), 4: _Tiles(64, 64, 1)}  # what is skipped depends on them
_BWD_DQ = {2: _Tiles(64, 64, 2), 4: _Tiles(32, 32, 1)}
_BWD_DKV = {2: _Tiles(64, 64, 2), 4: _Tiles(32, 32, 1)}
# For blocks of any size; of the stages one goes to the slots, which come before the rows.
_RAGGED_FWD = {2: _Tiles(64, 64, 5, 8), 4: _Tiles(32, 32, 1, 8)}
_RAGGED_BWD_DQ = {2: _Tiles(64, 64, 3, 8), 4: _Tiles(32, 32, 1, 8)}
_RAGGED_BWD_DKV = {2: _Tiles(64, 64, 2, 16), 4: _Tiles(32, 32, 1, 16)}


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


class _Plan(NamedTuple):
    """One launch: the grid over the tiles of one head, the lists to walk, and the sizes."""

    programs: int
    lists: tuple[Tensor, ...]
    counts: tuple[int, ...]
    meta: dict[str, int]


def _is_ragged(blocks: Blocks) -> bool:
    return max(blocks.q_block_size, blocks.kv_block_size) > MAX_BLOCK


def _plan(
    q: Tensor, k: Tensor, blocks: Blocks, fixed: dict[int, _Tiles], ragged: dict[int, _Tiles],
    *, own_keys: bool = False,
) -> _Plan:  # fmt: skip
    """Plan a launch whose programs own queries, or keys and walk the transposed lists."""
    offsets = (blocks.q_offsets, blocks.kv_offsets)
    num_tokens = (q.shape[2], k.shape[2])
    lists = (blocks.kv_num_blocks, blocks.kv_indices)
    own, other = (1, 0) if own_keys else (0, 1)
    if own_keys:
        lists = (blocks.q_num_blocks, blocks.q_indices)
    if _is_ragged(blocks):
        tiles = ragged[q.element_size()]
        made = tables(
            *lists, offsets[own], offsets[other], num_tokens[own], num_tokens[other],
            tiles.own, tiles.step, tiles.group,
        )  # fmt: skip
        lists, tile_map, programs = (made.counts, made.slots), made.tiles, made.tiles.shape[-1]
        mine, met = _Side(tiles.own, 1, False), _Side(tiles.step, 1, False)
    else:
        tiles = fixed[q.element_size()]
        sizes = (blocks.q_block_size, blocks.kv_block_size)
        mine, met = (
            _Side.cut(num_tokens[side], offsets[side].shape[-1] - 1, sizes[side], limit)
            for side, limit in ((own, tiles.own), (other, tiles.step))
        )
        tile_map, programs = lists[0], lists[0].shape[2] * mine.parts
    query, key = (met, mine) if own_keys else (mine, met)
    meta = {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_M": query.tile,
        "BLOCK_N": key.tile,
        "PARTS_M": query.parts,
        "PARTS_N": key.parts,
        "EVEN_Q": query.is_even,
        "EVEN_KV": key.is_even,
        "GROUP": tiles.group,
        "num_warps": 8 if mine.tile > 64 else 4,
        "num_stages": tiles.num_stages,
    }
    counts = (q.shape[1], q.shape[2], *lists[1].shape[2:], *map(head_stride, offsets))
    return _Plan(programs, (*lists, tile_map, *offsets), counts, meta)


def _pieces(
    q: Tensor, k: Tensor, blocks: Blocks, ragged: dict[int, _Tiles], *, own_keys: bool = False
) -> Iterator[tuple[tuple[slice, slice], Blocks]]:
    """Yield heads to launch together, and their blocks: all, unless the tables grow too large."""
    if not _is_ragged(blocks):
        yield (slice(None), slice(None)), blocks
        return
    num_lists, num_items = blocks.kv_indices.shape[2:]
    num_other = k.shape[2]
    if own_keys:
        num_lists, num_items, num_other = num_items, num_lists, q.shape[2]
    tiles = ragged[q.element_size()]
    slots = num_lists * slots_of_list(num_items, num_other, tiles.step, tiles.group)
    for at in heads_at_once(*q.shape[:2], slots):
        yield at, of_heads(blocks, at)


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D], strided like q, and lse [B, H, Sq], without autograd."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for at, some in _pieces(q, k, blocks, _RAGGED_FWD):
        _forward(q[at], k[at], v[at], out[at], lse[at], some, scale)
    return out, lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> None:
    plan = _plan(q, k, blocks, _FWD, _RAGGED_FWD)
    with on_device(q.device):
        _block_sparse_attention_fwd[(plan.programs, q.shape[0] * q.shape[1])](
            q, k, v, out, lse, *plan.lists,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *plan.counts, scale * _LOG2_E.value, None, None, None, **plan.meta, FILTER=False,
        )  # fmt: skip


def filtered(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, skip_below: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse and the share of tiles skipped, fp32 [B, H]; blocks of up to 128 tokens."""
    q, k, v = (unit_inner_stride(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    plan = _plan(q, k, blocks, _FILTERED_FWD, _RAGGED_FWD)
    limit = skip_below.expand(q.shape[1]).contiguous()
    counts = torch.empty(2, *q.shape[:2], plan.programs, dtype=torch.int32, device=q.device)
    met, kept = counts.unbind()
    with on_device(q.device):
        _block_sparse_attention_fwd[(plan.programs, q.shape[0] * q.shape[1])](
            q, k, v, out, lse, *plan.lists,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *plan.counts, scale * _LOG2_E.value, limit, met, kept, **plan.meta, FILTER=True,
        )  # fmt: skip
    num_met = met.sum(-1)
    return out, lse, (num_met - kept.sum(-1)) / num_met.clamp(min=1)


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
    rows = (q, k, v, out, grad_out, dq, lse, grad_lse, delta)
    for at, some in _pieces(q, k, blocks, _RAGGED_BWD_DQ):
        _backward_dq(*(x[at] for x in rows), some, scale)
    rows = (q, k, v, grad_out, dk, dv, lse, delta)
    for at, some in _pieces(q, k, blocks, _RAGGED_BWD_DKV, own_keys=True):
        _backward_dkv(*(x[at] for x in rows), some, scale)
    return dq, dk, dv


def _backward_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    dq: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    delta: Tensor,
    blocks: Blocks,
    scale: float,
) -> None:
    plan = _plan(q, k, blocks, _BWD_DQ, _RAGGED_BWD_DQ)
    with on_device(q.device):
        _block_sparse_attention_bwd_dq[(plan.programs, q.shape[0] * q.shape[1])](
            q, k, v, out, grad_out, dq, lse, grad_lse, delta, *plan.lists,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *out.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
            *plan.counts, scale, scale * _LOG2_E.value, **plan.meta,
        )  # fmt: skip


def _backward_dkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    dk: Tensor,
    dv: Tensor,
    lse: Tensor,
    delta: Tensor,
    blocks: Blocks,
    scale: float,
) -> None:
    plan = _plan(q, k, blocks, _BWD_DKV, _RAGGED_BWD_DKV, own_keys=True)
    with on_device(q.device):
        _block_sparse_attention_bwd_dkv[(plan.programs, q.shape[0] * q.shape[1])](
            q, k, v, grad_out, dk, dv, lse, delta, *plan.lists,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *grad_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *plan.counts, scale, scale * _LOG2_E.value, **plan.meta,
        )  # fmt: skip
