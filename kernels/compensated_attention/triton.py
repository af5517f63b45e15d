"""The centroids of compensated attention in Triton: they join the exact part in one softmax.

A kv block of n > 0 tokens that the q block has not selected is one column with the logit
c * q . mean(k) + ln n + bias and the value mean(v); `_columns` writes all that the logit adds to
the dot product, -inf where there is no column. The forward goes on from the out and lse of the
exact part. With the merged lse and D = rowsum(dO * O) - dLSE of the merged out, the gradients of
the exact part come from its own kernels, and for the columns
    A = exp(logit - lse)        dV_mean = A^T dO        dA = A * (dO V_mean^T - D)
    dQ += c * dA K_mean         dK_mean = c * dA^T Q    dbias = sum of dA over a q block
The token gradients get the share of the means, dK += dK_mean / n. There are few columns, so the
queries of a column are split over programs, whose fp32 parts are summed in order: no atomics. The
means come in the input type; A and dA are rounded to it for their second dot. q blocks of over 128
tokens, and those whose size the host does not know, are cut by a tile map (ragged.py): PARTS_M is
then 0.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backend import ceil_div, on_device
from ..blocks import Blocks, head_stride
from ..ragged import MAX_BLOCK, own_tile, tile_at, tile_map

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# Lengths and counts change from call to call; specialising on them would compile again.
_RUN_TIME = [
    "num_heads", "num_q", "num_q_blocks", "num_kv_blocks", "num_columns", "num_splits",
    "num_tiles", "tiles_per_split", "q_offsets_stride", "kv_offsets_stride", "parts",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME)
def _columns(
    columns_ptr, bias_ptr, num_blocks_ptr, indices_ptr, kv_offsets_ptr, kv_offsets_stride,
    stride_bb, stride_bh, stride_bq, stride_bk,
    num_heads, num_q_blocks, num_kv_blocks, num_columns,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write log2 n + bias of each column of one q block, -inf for one that it lacks."""
    q_block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    kv_offsets_ptr += head * kv_offsets_stride
    list_row = head * num_q_blocks + q_block
    columns_ptr += list_row * num_columns
    indices_ptr += list_row * num_kv_blocks
    bias_ptr += (head // num_heads) * stride_bb + (head % num_heads) * stride_bh
    bias_ptr += q_block * stride_bq
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists = column < num_kv_blocks
        first = tl.load(kv_offsets_ptr + column, mask=exists, other=0)
        size = tl.load(kv_offsets_ptr + column + 1, mask=exists, other=0) - first
        logit = tl.math.log2(tl.maximum(size, 1).to(tl.float32))
        if HAS_BIAS:
            bias_ptrs = bias_ptr + column.to(tl.int64) * stride_bk
            logit += tl.load(bias_ptrs, mask=exists, other=0.0) * _LOG2_E
        tl.store(columns_ptr + column, tl.where(size > 0, logit, float("-inf")))
    tl.debug_barrier()  # the stores above come before those below, made by other threads
    num_selected = tl.load(num_blocks_ptr + list_row)
    for start in range(0, num_selected, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = tl.load(indices_ptr + at, mask=at < num_selected, other=0)
        tl.store(columns_ptr + column, float("-inf"), mask=at < num_selected)


@triton.jit
def _tile(
    offsets_ptr, num_tokens, block, part,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return the first token of a tile, int64, and how many rows from there its block has."""
    if UNIFORM:  # only the last block may be shorter
        start = (block * PARTS + part) * BLOCK
        return start.to(tl.int64), num_tokens - start
    start = tl.load(offsets_ptr + block) + part * BLOCK
    return start.to(tl.int64), tl.load(offsets_ptr + block + 1) - start


@triton.jit
def _own(
    tiles_ptr, offsets_ptr, num_tokens, head,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return block, part, first token (int64) and rows of the tile that this program owns."""
    program = tl.program_id(0)
    if PARTS == 0:
        block, start, rows = own_tile(tiles_ptr, offsets_ptr, head)
        return block, program, start.to(tl.int64), rows
    else:
        block, part = program // PARTS, program % PARTS
        start, rows = _tile(offsets_ptr, num_tokens, block, part, BLOCK, PARTS, UNIFORM)
        return block, part, start, rows


@triton.jit
def _listed(
    tiles_ptr, offsets_ptr, num_tokens, i,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Return block, first token (int64) and rows of tile i of a head."""
    if PARTS == 0:
        block, start, rows = tile_at(tiles_ptr + i, offsets_ptr)
        return block, start.to(tl.int64), rows
    else:
        block = i // PARTS
        start, rows = _tile(offsets_ptr, num_tokens, block, i % PARTS, BLOCK, PARTS, UNIFORM)
        return block, start, rows


@triton.jit
def _load_means(means, start):
    """Load a tile of the head's means [BLOCK_N, HEAD_DIM]; rows past the last block are 0."""
    tile = means.load([tl.program_id(1), start, 0])
    return tl.reshape(tile, tile.shape[1], tile.shape[2])


@triton.jit(do_not_specialize=_RUN_TIME)
def _centroid_fwd(
    q_ptr, k_means, v_means, columns_ptr, out_ptr, lse_ptr, num_blocks_ptr,
    tiles_ptr, q_offsets_ptr, q_offsets_stride,
    stride_qb, stride_qh, stride_qs,
    stride_ob, stride_oh, stride_os,
    num_heads, num_q, num_q_blocks, num_kv_blocks, num_columns, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Continue the softmax of one tile of queries over the columns; out and lse are overwritten."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_offsets_ptr += head * q_offsets_stride
    q_block, _, q_start, q_rows = _own(
        tiles_ptr, q_offsets_ptr, num_q, head, BLOCK_M, PARTS_M, UNIFORM
    )
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK_N)
    exists = tl.arange(0, BLOCK_M) < q_rows
    token = q_start + tl.arange(0, BLOCK_M)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + dim[None, :]
    q = tl.load(q_ptrs, mask=exists[:, None], other=0.0)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_os + dim[None, :]
    acc = tl.load(out_ptrs, mask=exists[:, None], other=0.0).to(tl.float32)
    lse_ptrs = lse_ptr + head * num_q + token
    peak = tl.load(lse_ptrs, mask=exists, other=0.0) * _LOG2_E  # in units of log2
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    list_row = head * num_q_blocks + q_block
    columns_ptrs = columns_ptr + list_row * num_columns + column
    has_none = tl.load(num_blocks_ptr + list_row) == num_kv_blocks
    if PARTS_M == 0:
        has_none = has_none | (q_rows <= 0)
    for start in range(0, tl.where(has_none, 0, num_kv_blocks), BLOCK_N):
        k = _load_means(k_means, start)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = logits * scale_log2 + tl.load(columns_ptrs + start)[None, :]
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # Nothing so far, exact or not: keep -inf - (-inf) out of exp2.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = tl.math.exp2(logits - base[:, None])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(prob, 1)
        acc = acc * decay[:, None]
        v = _load_means(v_means, start)
        acc = tl.dot(prob.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak

    total = tl.where(total == 0.0, 1.0, total)  # no key at all: out 0, and lse = peak = -inf
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=exists[:, None])
    tl.store(lse_ptrs, (peak + tl.math.log2(total)) * _LN_2, mask=exists)


@triton.jit(do_not_specialize=_RUN_TIME)
def _centroid_bwd_dq(
    q_ptr, k_means, v_means, columns_ptr, out_ptr, grad_ptr, dq_ptr,
    lse_ptr, grad_lse_ptr, delta_ptr, dbias_ptr, num_blocks_ptr,
    tiles_ptr, q_offsets_ptr, q_offsets_stride,
    stride_qb, stride_qh, stride_qs,
    stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs,
    stride_dqb, stride_dqh, stride_dqs,
    num_heads, num_q, num_q_blocks, num_kv_blocks, num_columns, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, UNIFORM: tl.constexpr, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """Add to dQ of one tile of queries; also writes D, and dbias.

    dbias is [PARTS_M, B, H, Nq, Nk], or by tile, [B, H, tiles, Nk].
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    q_offsets_ptr += head * q_offsets_stride
    q_block, part, q_start, q_rows = _own(
        tiles_ptr, q_offsets_ptr, num_q, head, BLOCK_M, PARTS_M, UNIFORM
    )
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK_N)
    exists = tl.arange(0, BLOCK_M) < q_rows
    token = q_start + tl.arange(0, BLOCK_M)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + dim[None, :]
    q = tl.load(q_ptrs, mask=exists[:, None], other=0.0)
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh + token[:, None] * stride_gs + dim[None, :]
    grad = tl.load(grad_ptrs, mask=exists[:, None], other=0.0)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_os + dim[None, :]
    out = tl.load(out_ptrs, mask=exists[:, None], other=0.0)
    at = head * num_q + token
    grad_lse = tl.load(grad_lse_ptr + at, mask=exists, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) - grad_lse
    tl.store(delta_ptr + at, delta, mask=exists)
    lse = tl.load(lse_ptr + at, mask=exists, other=float("inf"))  # inf: A = 0 in rows not there
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * _LOG2_E

    list_row = head * num_q_blocks + q_block
    columns_ptrs = columns_ptr + list_row * num_columns + column
    num_used = num_kv_blocks
    if BIAS_GRAD:
        if PARTS_M == 0:
            at_sum = head * tl.num_programs(0) + part
        else:
            at_sum = part * (tl.num_programs(1).to(tl.int64) * num_q_blocks) + list_row
        dbias_ptrs = dbias_ptr + at_sum * num_kv_blocks + column
    else:
        all_selected = tl.load(num_blocks_ptr + list_row) == num_kv_blocks
        num_used = tl.where(all_selected, 0, num_kv_blocks)
    if PARTS_M == 0:
        num_used = tl.where(q_rows > 0, num_used, 0)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, num_used, BLOCK_N):
        k = _load_means(k_means, start)
        v = _load_means(v_means, start)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = logits * scale_log2 + tl.load(columns_ptrs + start)[None, :]
        prob = tl.math.exp2(logits - lse[:, None])
        dprob = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dlogits = prob * (dprob - delta[:, None])
        if BIAS_GRAD:
            in_row = start + column < num_kv_blocks
            tl.store(dbias_ptrs + start, tl.sum(dlogits, 0), mask=in_row)
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + token[:, None] * stride_dqs + dim[None, :]
    dq = tl.load(dq_ptrs, mask=exists[:, None], other=0.0).to(tl.float32) + dq * scale
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit(do_not_specialize=_RUN_TIME)
def _centroid_bwd_dkv(
    q_ptr, k_mean_ptr, v_mean_ptr, columns_ptr, grad_ptr, dk_parts_ptr, dv_parts_ptr,
    lse_ptr, delta_ptr, tiles_ptr, used_ptr, q_offsets_ptr, q_offsets_stride,
    stride_qb, stride_qh, stride_qs,
    stride_gb, stride_gh, stride_gs,
    num_heads, num_q, num_q_blocks, num_kv_blocks, num_columns, num_tiles, tiles_per_split,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS_M: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """dK_mean / c and dV_mean of one tile of columns over one split of the tiles of queries.

    Everything is transposed, [BLOCK_N, BLOCK_M]. The parts are [splits, B, H, Nk, D].
    """
    num_tiles_n = tl.cdiv(num_kv_blocks, BLOCK_N)
    split = tl.program_id(0) // num_tiles_n
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (column < num_kv_blocks)[:, None]
    mean = column.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    k = tl.load(k_mean_ptr + head * num_kv_blocks * HEAD_DIM + mean, mask=exists, other=0.0)
    v = tl.load(v_mean_ptr + head * num_kv_blocks * HEAD_DIM + mean, mask=exists, other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    grad_ptr += b * stride_gb + h * stride_gh
    lse_ptr += head * num_q
    delta_ptr += head * num_q
    columns_ptrs = columns_ptr + head * num_q_blocks * num_columns + column

    q_offsets_ptr += head * q_offsets_stride
    if PARTS_M == 0:  # the tiles that there are, shared out evenly
        tiles_ptr += head * num_tiles
        num_tiles = tl.load(used_ptr + head)
        tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(0) // num_tiles_n)
    first = split * tiles_per_split
    past = tl.minimum(first + tiles_per_split, num_tiles)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for i in range(first, past):
        q_block, q_start, q_rows = _listed(
            tiles_ptr, q_offsets_ptr, num_q, i, BLOCK_M, PARTS_M, UNIFORM
        )
        in_tile = row < q_rows
        token = q_start + row  # addresses are made here, not kept: registers are short
        q_ptrs = q_ptr + token[:, None] * stride_qs + dim[None, :]
        q = tl.load(q_ptrs, mask=in_tile[:, None], other=0.0)
        grad_ptrs = grad_ptr + token[:, None] * stride_gs + dim[None, :]
        grad = tl.load(grad_ptrs, mask=in_tile[:, None], other=0.0)
        lse = tl.load(lse_ptr + token, mask=in_tile, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) * _LOG2_E
        delta = tl.load(delta_ptr + token, mask=in_tile, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        logits += tl.load(columns_ptrs + q_block.to(tl.int64) * num_columns)[:, None]
        prob = tl.math.exp2(logits - lse[None, :])
        dv = tl.dot(prob.to(grad.dtype), grad, dv, input_precision="ieee")
        dprob = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dlogits = prob * (dprob - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")

    at = (split * tl.num_programs(1).to(tl.int64) + head) * num_kv_blocks * HEAD_DIM
    tl.store(dk_parts_ptr + at + mean, dk, mask=exists)
    tl.store(dv_parts_ptr + at + mean, dv, mask=exists)


@triton.jit(do_not_specialize=_RUN_TIME)
def _spread(
    dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr, kv_offsets_ptr, kv_offsets_stride,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    num_heads, num_kv_blocks, num_splits, parts, scale,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum what the splits found for a kv block; add its share to dK and dV of a part of it."""
    kv_block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    kv_offsets_ptr += head * kv_offsets_stride
    b, h = head // num_heads, head % num_heads
    dim = tl.arange(0, HEAD_DIM)
    at = (head * num_kv_blocks + kv_block) * HEAD_DIM + dim
    step = tl.num_programs(1).to(tl.int64) * num_kv_blocks * HEAD_DIM
    dk_mean = tl.zeros([HEAD_DIM], tl.float32)
    dv_mean = tl.zeros([HEAD_DIM], tl.float32)
    for split in range(num_splits):
        dk_mean += tl.load(dk_parts_ptr + at + split * step)
        dv_mean += tl.load(dv_parts_ptr + at + split * step)
    start = tl.load(kv_offsets_ptr + kv_block)
    size = tl.load(kv_offsets_ptr + kv_block + 1) - start
    share = 1.0 / tl.maximum(size, 1).to(tl.float32)
    dk_mean *= share * scale
    dv_mean *= share
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    for first in range(part * BLOCK, size, parts * BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = (row < size)[:, None]
        token = (start + row).to(tl.int64)[:, None]
        dk_ptrs = dk_ptr + token * stride_dks + dim[None, :]
        dk = tl.load(dk_ptrs, mask=exists, other=0.0).to(tl.float32) + dk_mean[None, :]
        tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=exists)
        dv_ptrs = dv_ptr + token * stride_dvs + dim[None, :]
        dv = tl.load(dv_ptrs, mask=exists, other=0.0).to(tl.float32) + dv_mean[None, :]
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_RUN_TIME)
def _sum_tiles(
    dbias_ptr, parts_ptr, first_ptr, num_q_blocks, num_kv_blocks, num_tiles, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum dbias over the tiles of one q block."""
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first_ptr += head * (num_q_blocks + 1) + q_block
    first, past = tl.load(first_ptr), tl.load(first_ptr + 1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = column < num_kv_blocks
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(first, past):
        at = (head * num_tiles + tile) * num_kv_blocks
        total += tl.load(parts_ptr + at + column, mask=exists, other=0.0)
    tl.store(dbias_ptr + (head * num_q_blocks + q_block) * num_kv_blocks + column, total, exists)


class _Tiles(NamedTuple):
    rows: int  # queries, at most
    columns: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# By bytes per element. A tile of fewer queries, of a smaller q block, takes 4 warps.
_FWD = {2: _Tiles(128, 64, 8, 2), 4: _Tiles(32, 32, 8, 1)}
_BWD_DQ = {2: _Tiles(64, 64, 4, 2), 4: _Tiles(32, 16, 4, 1)}
_BWD_DKV = {2: _Tiles(64, 64, 4, 2), 4: _Tiles(32, 32, 4, 1)}
_COLUMNS = 128  # a row of columns is padded to a multiple of it
_SPREAD = 32
# A q tile of blocks of any size: the last one of a block is on average half empty.
_RAGGED_ROWS = 64
# As many programs share the tokens of a kv block, at most, one for each so many tokens.
_MAX_PARTS, _PART = 4, 1024
# Programs of the dK/dV kernel: 8 for each of the 132 SMs of an H100.
_NUM_PROGRAMS = 1056


class _Queries(NamedTuple):
    """The q blocks, cut into tiles."""

    tile: int
    parts: int  # tiles a block, 0 for any number
    num_tiles: int  # of a head, at most
    is_uniform: bool  # every tile but the last is full
    tiles: Tensor  # the tile map of blocks of any size, else any tensor
    used: Tensor

    @classmethod
    def cut(cls, q: Tensor, blocks: Blocks, limit: int) -> "_Queries":
        offsets = blocks.q_offsets
        num_blocks = offsets.shape[-1] - 1
        if blocks.q_block_size > MAX_BLOCK:
            tile = min(limit, _RAGGED_ROWS)
            made = tile_map(offsets, q.shape[:2], q.shape[2], tile)
            return cls(tile, 0, made.tiles.shape[-1], False, *made)
        padded = max(16, triton.next_power_of_2(blocks.q_block_size))
        tile = min(padded, limit)
        is_uniform = blocks.is_uniform and padded == blocks.q_block_size
        parts = padded // tile
        return cls(tile, parts, num_blocks * parts, is_uniform, offsets, offsets)


def _meta(q: Tensor, query: _Queries, tiles: _Tiles) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_M": query.tile,
        "BLOCK_N": tiles.columns,
        "PARTS_M": query.parts,
        "UNIFORM": query.is_uniform,
        "num_warps": tiles.num_warps if query.tile == tiles.rows else 4,
        "num_stages": tiles.num_stages,
        "maxnreg": tiles.max_registers,
    }


def _described(k_mean: Tensor, v_mean: Tensor, tiles: _Tiles) -> list[TensorDescriptor]:
    """Return the means as [B * H, Nk, D] in tiles of columns; TMA loads them where there is one."""
    shape = (-1, *k_mean.shape[2:])
    block = [1, tiles.columns, k_mean.shape[3]]
    return [TensorDescriptor.from_tensor(x.view(shape), block) for x in (k_mean, v_mean)]


def column_logits(blocks: Blocks, bias: Tensor | None) -> Tensor:
    """Return log2 n + bias of each column, fp32 [B, H, Nq, Nk and padding], -inf for none.

    Everything is in units of log2; the padding goes up to a multiple of 128.
    """
    batch, heads, num_q_blocks, num_kv_blocks = blocks.kv_indices.shape
    num_columns = triton.cdiv(num_kv_blocks, _COLUMNS) * _COLUMNS
    columns = blocks.kv_indices.new_empty(
        (batch, heads, num_q_blocks, num_columns), dtype=torch.float32
    )
    with on_device(columns.device):
        _columns[(num_q_blocks, batch * heads)](
            columns, columns if bias is None else bias,
            blocks.kv_num_blocks, blocks.kv_indices,
            blocks.kv_offsets, head_stride(blocks.kv_offsets),
            *(columns if bias is None else bias).stride(),
            heads, num_q_blocks, num_kv_blocks, num_columns,
            HAS_BIAS=bias is not None, BLOCK=_COLUMNS, num_warps=1,
        )  # fmt: skip
    return columns


def _counts(q: Tensor, blocks: Blocks, columns: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[2], *blocks.kv_indices.shape[2:], columns.shape[3]


def add_centroids(
    q: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
    scale: float,
) -> None:
    """Turn the out and lse of the exact part, in place, into those of compensated attention.

    k_mean and v_mean [B, H, Nk, D] are contiguous and of q's type; bias is [B, H, Nq, Nk].
    """
    num_heads = q.shape[0] * q.shape[1]
    tiles = _FWD[q.element_size()]
    query = _Queries.cut(q, blocks, tiles.rows)
    columns = column_logits(blocks, bias)
    with on_device(q.device):
        _centroid_fwd[(query.num_tiles, num_heads)](
            q, *_described(k_mean, v_mean, tiles), columns, out, lse,
            blocks.kv_num_blocks, query.tiles, blocks.q_offsets, head_stride(blocks.q_offsets),
            *q.stride()[:3], *out.stride()[:3],
            *_counts(q, blocks, columns), scale * _LOG2_E.value,
            **_meta(q, query, tiles),
        )  # fmt: skip


def centroid_gradients(
    grad_out: Tensor,
    q: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    columns: Tensor,
    lse: Tensor,
    delta: Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return dK_mean / scale and dV_mean in fp32 parts [parts, B, H, Nk, D], to be summed.

    lse and delta [B, H, Sq] are those of compensated attention.
    """
    num_heads = q.shape[0] * q.shape[1]
    num_q_blocks, num_kv_blocks = blocks.kv_indices.shape[2:]
    tiles = _BWD_DKV[q.element_size()]
    query = _Queries.cut(q, blocks, tiles.rows)
    tiles_n = ceil_div(num_kv_blocks, tiles.columns)
    units = num_q_blocks if query.parts else query.num_tiles
    per_split = ceil_div(units, ceil_div(_NUM_PROGRAMS, tiles_n * num_heads))
    splits = ceil_div(units, per_split)
    dk_parts, dv_parts = lse.new_empty((2, splits, *k_mean.shape))
    with on_device(q.device):
        _centroid_bwd_dkv[(tiles_n * splits, num_heads)](
            q, k_mean, v_mean, columns, grad_out, dk_parts, dv_parts,
            lse, delta, query.tiles, query.used, blocks.q_offsets, head_stride(blocks.q_offsets),
            *q.stride()[:3], *grad_out.stride()[:3],
            *_counts(q, blocks, columns), query.num_tiles, per_split * query.parts,
            scale * _LOG2_E.value,
            **_meta(q, query, tiles),
        )  # fmt: skip
    return dk_parts, dv_parts


def add_centroid_gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    blocks: Blocks,
    scale: float,
    bias_grad: bool,
) -> Tensor | None:
    """Add what the centroids contribute to dq, dk and dv, in place; return dbias if asked for.

    out and lse are those of compensated attention.
    """
    num_heads = q.shape[0] * q.shape[1]
    num_kv_blocks = blocks.kv_indices.shape[3]
    delta = torch.empty_like(lse)
    scale_log2 = scale * _LOG2_E.value
    with on_device(q.device):
        columns = column_logits(blocks, bias)
        counts = _counts(q, blocks, columns)
        tiles = _BWD_DQ[q.element_size()]
        if bias_grad:  # its sum over rows would make ptxas serialise the pipelined dots
            tiles = tiles._replace(num_stages=1)
        query = _Queries.cut(q, blocks, tiles.rows)
        dbias = _new_dbias(query, blocks) if bias_grad else None
        _centroid_bwd_dq[(query.num_tiles, num_heads)](
            q, *_described(k_mean, v_mean, tiles), columns, out, grad_out, dq, lse, grad_lse, delta,
            delta if dbias is None else dbias, blocks.kv_num_blocks,
            query.tiles, blocks.q_offsets, head_stride(blocks.q_offsets),
            *q.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
            *counts, scale, scale_log2,
            **_meta(q, query, tiles), BIAS_GRAD=bias_grad,
        )  # fmt: skip
        if dbias is not None:
            dbias = _sum_dbias(query, blocks, dbias)
        dk_parts, dv_parts = centroid_gradients(
            grad_out, q, k_mean, v_mean, columns, lse, delta, blocks, scale
        )
        parts = min(ceil_div(blocks.kv_block_size, _PART), _MAX_PARTS)
        _spread[(num_kv_blocks * parts, num_heads)](
            dk, dv, dk_parts, dv_parts, blocks.kv_offsets, head_stride(blocks.kv_offsets),
            *dk.stride()[:3], *dv.stride()[:3],
            q.shape[1], num_kv_blocks, dk_parts.shape[0], parts, scale,
            HEAD_DIM=q.shape[-1], BLOCK=_SPREAD,
        )  # fmt: skip
    return dbias


def _new_dbias(query: _Queries, blocks: Blocks) -> Tensor:
    *heads, num_q_blocks, num_kv_blocks = blocks.kv_indices.shape
    shape = (query.parts, *heads, num_q_blocks, num_kv_blocks)
    if query.parts == 0:
        shape = (*heads, query.num_tiles, num_kv_blocks)
    return blocks.kv_indices.new_empty(shape, dtype=torch.float32)


def _sum_dbias(query: _Queries, blocks: Blocks, parts: Tensor) -> Tensor:
    """Return dbias [B, H, Nq, Nk] of what the tiles found."""
    if query.parts:
        return parts.sum(0)
    batch, heads, num_q_blocks, num_kv_blocks = blocks.kv_indices.shape
    block = torch.where(query.tiles < 0, num_q_blocks, query.tiles >> 32)  # ascending
    edge = torch.arange(num_q_blocks + 1, device=block.device).expand(batch, heads, -1).contiguous()
    first = torch.searchsorted(block, edge, out_int32=True)
    dbias = parts.new_empty(blocks.kv_indices.shape)
    _sum_tiles[(num_q_blocks, batch * heads, ceil_div(num_kv_blocks, _COLUMNS))](
        dbias, parts, first, num_q_blocks, num_kv_blocks, query.num_tiles,
        BLOCK=_COLUMNS, num_warps=1,
    )  # fmt: skip
    return dbias
