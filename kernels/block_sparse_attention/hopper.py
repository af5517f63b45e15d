"""Block-sparse attention on Hopper (sm_90), in Gluon: forward, dQ and dK/dV.

The formulas are those of triton.py. A producer warp walks the index lists and keeps a ring of tiles
full with TMA copies; one or two consumer warpgroups of 64 rows each compute with asynchronous
wgmma. A program takes one tile, so that the GPU's own scheduler balances rows of unequal length;
only the forward of 128 rows, which has its SM to itself and would wait for its first tile each
time, stays resident and takes every n-th; order.py says in which order. TMA fills rows past the end
of the sequence with 0 and drops them on the way out. (Tiles drawn from an atomic counter balance as
well, but the 64-row forward lost some when lists were short; the cause was not found.)

Written for Triton 3.6, whose compiler asks for three habits:
- The exponentials would sink below the next wgmma wait, and nothing would overlap. So the wait
  takes the fp32 P as a dependency, and an mbarrier wait (a basic block ends) stands before it.
- A name assigned from another before a loop and again inside it must be copied with `+ 0`.
- wgmma tokens other than the accumulator must not cross the back edge of a loop.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..backend import on_device
from ..blocks import Blocks
from ..order import by_length, outliers_first
from ..tma import advance, aligned, describe_matrix, describe_rows

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)

# Lengths and counts change from call to call; specialising on them would compile again.
_RUN_TIME = [
    "num_heads",
    "num_own",
    "num_other",
    "num_own_blocks",
    "num_other_blocks",
    "num_tiles",
    "column_tiles",
    "num_parts",
]


@gluon.jit
def _send(box, value):
    """Write a number into box, int32 [1] in shared memory; from the producer warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    box.store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _receive(box):
    """Read the number in box; from a consumer warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(box.load(layout), axis=0)


@gluon.jit
def _copy(desc, b, h, low, high, full, tile, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """Copy ROWS rows from `low` on into a tile, or two runs of ROWS rows from `low` and `high`."""
    BYTES: gl.constexpr = HALVES * desc.block_type.nbytes
    mbarrier.expect(full, BYTES)
    if HALVES == 1:
        tma.async_copy_global_to_shared(desc, [b, h, low, 0], full, tile)
    else:
        tma.async_copy_global_to_shared(desc, [b, h, low, 0], full, tile.slice(0, ROWS, 2))
        tma.async_copy_global_to_shared(desc, [b, h, high, 0], full, tile.slice(ROWS, ROWS, 2))


@gluon.jit
def _num_steps(count, last_rows, STEP: gl.constexpr, BLOCK: gl.constexpr):
    """How many tiles of STEP rows cover a list of `count` blocks whose last has last_rows rows."""
    if STEP > BLOCK:
        steps = (count + 1) // 2
    elif STEP == BLOCK:
        steps = count
    else:
        steps = (count - 1) * (BLOCK // STEP) + (last_rows + STEP - 1) // STEP
    return gl.maximum(steps, 0)


@gluon.jit
def _step_starts(list_ptr, count, step, STEP: gl.constexpr, BLOCK: gl.constexpr):
    """First rows of the two halves of a tile, which are one unless two blocks fill it.

    A half that no block fills repeats the other, and a list without blocks starts at row 0: what is
    read there is masked, but is never memory that nobody wrote.
    """
    if STEP > BLOCK:
        first = gl.load(list_ptr + 2 * step, mask=2 * step < count, other=0)
        second = gl.load(list_ptr + 2 * step + 1, mask=2 * step + 1 < count, other=0)
        low = first * BLOCK
        high = gl.where(2 * step + 1 < count, second * BLOCK, low)
    else:
        PARTS: gl.constexpr = BLOCK // STEP
        block = gl.load(list_ptr + step // PARTS, mask=count > 0, other=0)
        low = block * BLOCK + step % PARTS * STEP
        high = low
    return low, high


@gluon.jit
def _num_column_steps(count, num_blocks, STEP: gl.constexpr):
    """How many tiles of STEP centroids there are; none if every block is selected."""
    return gl.where(count < num_blocks, (num_blocks + STEP - 1) // STEP, 0)


@gluon.jit
def _fwd_producer(
    arguments, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, STEP: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    (
        q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, q_s, k_s, v_s, box_s, q_full, q_free,
        k_full, k_free, v_full, v_free, order_ptr, num_blocks_ptr, indices_ptr, num_heads,
        num_other, num_own_blocks, num_other_blocks, num_tiles,
    ) = arguments  # fmt: skip
    HALVES: gl.constexpr = 2 if STEP > BLOCK_KV else 1
    ROWS: gl.constexpr = STEP // HALVES
    stage = 0
    phase = 1
    q_phase = 1
    slot = gl.program_id(0)
    while slot < num_tiles:
        tile = gl.load(order_ptr + slot)
        head = tile // num_own_blocks
        block = tile % num_own_blocks
        b = head // num_heads
        h = head % num_heads
        count = gl.load(num_blocks_ptr + tile)
        list_ptr = indices_ptr + tile.to(gl.int64) * num_other_blocks
        last = gl.load(list_ptr + count - 1, mask=count > 0, other=0)
        last_rows = gl.where(count > 0, gl.minimum(BLOCK_KV, num_other - last * BLOCK_KV), 0)
        mbarrier.wait(q_free, q_phase)
        _send(box_s.index(0), tile)
        _send(box_s.index(1), count)
        _send(box_s.index(2), last_rows)
        Q_BYTES: gl.constexpr = GROUPS * q_desc.block_type.nbytes
        mbarrier.expect(q_full, Q_BYTES)
        for i in gl.static_range(GROUPS):
            start = block * BLOCK_Q + i * 64
            tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], q_full, q_s.index(i))
        q_phase ^= 1
        steps = gl.maximum(_num_steps(count, last_rows, STEP, BLOCK_KV), 1)
        for i in range(steps):
            low, high = _step_starts(list_ptr, count, steps - 1 - i, STEP, BLOCK_KV)
            mbarrier.wait(k_free.index(stage), phase)
            _copy(k_desc, b, h, low, high, k_full.index(stage), k_s.index(stage), ROWS, HALVES)
            mbarrier.wait(v_free.index(stage), phase)
            _copy(v_desc, b, h, low, high, v_full.index(stage), v_s.index(stage), ROWS, HALVES)
            stage, phase = advance(stage, phase, STAGES)
        if COLUMNS:
            for i in range(_num_column_steps(count, num_other_blocks, STEP)):
                at = i * STEP
                mbarrier.wait(k_free.index(stage), phase)
                _copy(k_mean_desc, b, h, at, at, k_full.index(stage), k_s.index(stage), STEP, 1)
                mbarrier.wait(v_free.index(stage), phase)
                _copy(v_mean_desc, b, h, at, at, v_full.index(stage), v_s.index(stage), STEP, 1)
                stage, phase = advance(stage, phase, STAGES)
        slot += gl.num_programs(0)
    mbarrier.wait(q_free, q_phase)
    _send(box_s.index(0), num_tiles)
    mbarrier.arrive(q_full, count=1)


@gluon.jit
def _fwd_step(
    q, acc, prob, peak, total, ring, v_stage, v_phase, turns, more, scale_log2, columns_ptr,
    GROUP: gl.constexpr, STEP: gl.constexpr, HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Meet the next tile while the one before it, at v_stage, is added to acc.

    With COLUMNS the tile holds centroids, and columns_ptr what their logits add to the products.
    """
    k_s, v_s, k_full, k_free, v_full, v_free, turn = ring
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    stage, phase = advance(v_stage, v_phase, STAGES)
    if GROUPS == 2:
        mbarrier.wait(turn.index(GROUP), turns & 1)
    zero = gl.zeros([64, STEP], gl.float32, LOGITS)
    k = k_s.index(stage).reshape([STEP, HEAD_DIM]).permute((1, 0))
    token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    v = v_s.index(v_stage).reshape([STEP, HEAD_DIM])
    acc_token = warpgroup_mma(prob, v, acc, is_async=True)
    if GROUPS == 2:
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
    if COLUMNS:
        column = gl.arange(0, STEP, layout=gl.SliceLayout(0, LOGITS))
        bias = gl.load(columns_ptr + column)
    s = warpgroup_mma_wait(1, deps=[token])
    mbarrier.arrive(k_free.index(stage), count=1)
    if COLUMNS:
        s = s * scale_log2 + bias[None, :]
        new_peak = gl.maximum(peak, gl.max(s, axis=1))
        prob32 = gl.exp2(s - new_peak[:, None])
    else:
        new_peak = gl.maximum(peak, gl.max(s, axis=1) * scale_log2)
        prob32 = gl.exp2(s * scale_log2 - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    total = total * decay + gl.sum(prob32, axis=1)
    next_stage, next_phase = advance(stage, phase, STAGES)
    mbarrier.wait(k_full.index(next_stage), next_phase, pred=more)
    acc, _, prob32, total, decay = warpgroup_mma_wait(
        0, deps=[acc_token, prob, prob32, total, decay]
    )
    mbarrier.arrive(v_free.index(v_stage), count=1)
    prob = gl.convert_layout(prob32.to(v_s.dtype), OPERAND)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
    return acc, prob, new_peak, total, stage, phase


@gluon.jit
def _fwd_consumer(
    arguments, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr,
    STEP: gl.constexpr, HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    (
        out_desc, lse_ptr, columns_ptr, q_s, k_s, v_s, out_s, box_s, q_full, q_free, k_full, k_free,
        v_full, v_free, turn, num_heads, num_own, num_own_blocks, num_other_blocks, column_tiles,
        num_tiles, scale_log2,
    ) = arguments  # fmt: skip
    ring = (k_s, v_s, k_full, k_free, v_full, v_free, turn)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = out_desc.dtype
    half = gl.arange(0, STEP, layout=gl.SliceLayout(0, LOGITS)) // BLOCK_KV
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, LOGITS)) % BLOCK_KV
    q = q_s.index(GROUP).reshape([64, HEAD_DIM])
    stage = 0
    phase = 0
    q_phase = 0
    turns = 0
    mbarrier.wait(q_full, q_phase)
    tile = _receive(box_s.index(0))
    while tile < num_tiles:
        count = _receive(box_s.index(1))
        last_rows = _receive(box_s.index(2))
        steps = gl.maximum(_num_steps(count, last_rows, STEP, BLOCK_KV), 1)
        column_steps = 0
        if COLUMNS:
            column_steps = _num_column_steps(count, num_other_blocks, STEP)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, ACC)
        # The lists are walked from their end: only the first tile can hold rows that are not there.
        mbarrier.wait(k_full.index(stage), phase)
        if GROUPS == 2:
            mbarrier.wait(turn.index(GROUP), turns & 1)
        zero = gl.zeros([64, STEP], gl.float32, LOGITS)
        k = k_s.index(stage).reshape([STEP, HEAD_DIM]).permute((1, 0))
        token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        if GROUPS == 2:
            mbarrier.arrive(turn.index(1 - GROUP), count=1)
            turns += 1
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_free.index(stage), count=1)
        if STEP > BLOCK_KV:  # two blocks; with an odd count the second is missing
            even = count % 2 == 0
            rows = gl.where(half == 0, gl.where(even & (count > 0), BLOCK_KV, last_rows),
                            gl.where(even, last_rows, 0))  # fmt: skip
            s = gl.where((column < rows)[None, :], s, float("-inf"))
        else:
            rows = last_rows - (last_rows - 1) // STEP * STEP
            rows = gl.where(last_rows > 0, rows, 0)
            s = gl.where((column % STEP < rows)[None, :], s, float("-inf"))
        peak = gl.max(s, axis=1) * scale_log2
        base = gl.where(peak == float("-inf"), 0.0, peak)  # no key at all
        prob32 = gl.exp2(s * scale_log2 - base[:, None])
        total = gl.sum(prob32, axis=1)
        prob = gl.convert_layout(prob32.to(dtype), OPERAND)
        next_stage, next_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=steps + column_steps > 1)
        for i in range(1, steps):
            acc, prob, peak, total, stage, phase = _fwd_step(
                q, acc, prob, peak, total, ring, stage, phase, turns, i + 1 < steps + column_steps,
                scale_log2, columns_ptr, GROUP, STEP, HEAD_DIM, GROUPS, STAGES, False,
            )  # fmt: skip
            turns += 1
        if COLUMNS:
            row_ptr = columns_ptr + tile.to(gl.int64) * (column_tiles * 128)
            for i in range(column_steps):
                acc, prob, peak, total, stage, phase = _fwd_step(
                    q, acc, prob, peak, total, ring, stage, phase, turns, i + 1 < column_steps,
                    scale_log2, row_ptr + i * STEP, GROUP, STEP, HEAD_DIM, GROUPS, STAGES, True,
                )  # fmt: skip
                turns += 1
        if GROUPS == 2:
            mbarrier.arrive(q_free, count=1)
        mbarrier.wait(v_full.index(stage), phase)
        v = v_s.index(stage).reshape([STEP, HEAD_DIM])
        acc_token = warpgroup_mma(prob, v, acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, deps=[acc_token, prob])
        mbarrier.arrive(v_free.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)

        # No key at all: out 0, whatever V was read, and lse = peak = -inf.
        share = gl.convert_layout(gl.where(total == 0.0, 0.0, 1.0 / total), gl.SliceLayout(1, ACC))
        acc = gl.where((share == 0.0)[:, None], 0.0, acc * share[:, None])
        total = gl.where(total == 0.0, 1.0, total)
        head = tile // num_own_blocks
        start = tile % num_own_blocks * BLOCK_Q + GROUP * 64
        row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, LOGITS))
        lse = (peak + gl.log2(total)) * _LN_2
        gl.store(lse_ptr + head.to(gl.int64) * num_own + row, lse, mask=row < num_own)
        tma.store_wait(0)
        out = out_s.index(GROUP)
        out.reshape([64, HEAD_DIM]).store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out_desc, [head // num_heads, head % num_heads, start, 0], out
        )
        if GROUPS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free, count=1)
        q_phase ^= 1
        mbarrier.wait(q_full, q_phase)
        tile = _receive(box_s.index(0))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_fwd(
    q_desc, k_desc, v_desc, out_desc, k_mean_desc, v_mean_desc, columns_ptr, lse_ptr, order_ptr,
    num_blocks_ptr, indices_ptr, num_heads, num_own, num_other, num_own_blocks, num_other_blocks,
    column_tiles, num_tiles, scale_log2,
    BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, STEP: gl.constexpr, HEAD_DIM: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    out_s = q_s  # one group: two programs then fit on an SM
    if GROUPS == 2:
        out_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], out_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, STEP, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, STEP, HEAD_DIM], v_desc.layout)
    box_s = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    if GROUPS == 2:
        mbarrier.arrive(turn.index(0), count=1)
    producer = (
        q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, q_s, k_s, v_s, box_s, q_full, q_free,
        k_full, k_free, v_full, v_free, order_ptr, num_blocks_ptr, indices_ptr, num_heads,
        num_other, num_own_blocks, num_other_blocks, num_tiles,
    )  # fmt: skip
    consumer = (
        out_desc, lse_ptr, columns_ptr, q_s, k_s, v_s, out_s, box_s, q_full, q_free, k_full, k_free,
        v_full, v_free, turn, num_heads, num_own, num_own_blocks, num_other_blocks, column_tiles,
        num_tiles, scale_log2,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_fwd_consumer, (
                consumer, 0, BLOCK_Q, BLOCK_KV, STEP, HEAD_DIM, GROUPS, STAGES, COLUMNS)),
            (_fwd_consumer, (
                consumer, 1, BLOCK_Q, BLOCK_KV, STEP, HEAD_DIM, GROUPS, STAGES, COLUMNS)),
            (_fwd_producer, (producer, BLOCK_Q, BLOCK_KV, STEP, GROUPS, STAGES, COLUMNS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_fwd_consumer, (
                consumer, 0, BLOCK_Q, BLOCK_KV, STEP, HEAD_DIM, GROUPS, STAGES, COLUMNS)),
            (_fwd_producer, (producer, BLOCK_Q, BLOCK_KV, STEP, GROUPS, STAGES, COLUMNS)),
        ], [1], [24])  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "num_heads"])
def _delta(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, row_ptr, delta_ptr,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs,
    num_heads, num_rows, num_tiles, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write lse * log2(e) and D of 64 rows side by side, 0 for rows past the end; and D alone."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    dim = tl.arange(0, HEAD_DIM)
    inside = row < num_rows
    at = row.to(tl.int64)[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + at * stride_os + dim[None, :]
    grad_ptrs = grad_ptr + b * stride_gb + h * stride_gh + at * stride_gs + dim[None, :]
    out = tl.load(out_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + head * num_rows + row, mask=inside, other=0.0)
    grad_lse = tl.load(grad_lse_ptr + head * num_rows + row, mask=inside, other=0.0)
    row_ptr += (head * num_tiles + tl.program_id(0)) * 128 + tl.arange(0, 64)
    tl.store(row_ptr, lse * 1.4426950408889634)
    delta = tl.sum(out * grad, 1) - grad_lse
    tl.store(row_ptr + 64, delta)
    tl.store(delta_ptr + head * num_rows + row, delta, mask=inside)


@gluon.jit
def _dq_producer(
    arguments, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    (
        q_desc, grad_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, q_s, grad_s, k_s, v_s, box_s,
        q_full, q_free, full, free, num_blocks_ptr, indices_ptr, num_heads, num_other,
        num_own_blocks, num_other_blocks, num_tiles,
    ) = arguments  # fmt: skip
    Q_BYTES: gl.constexpr = 2 * GROUPS * q_desc.block_type.nbytes
    BYTES: gl.constexpr = 2 * k_desc.block_type.nbytes
    stage = 0
    phase = 1
    q_phase = 1
    tile = gl.program_id(0)
    while tile < num_tiles:
        head = tile // num_own_blocks
        b = head // num_heads
        h = head % num_heads
        count = gl.load(num_blocks_ptr + tile)
        list_ptr = indices_ptr + tile.to(gl.int64) * num_other_blocks
        last = gl.load(list_ptr + count - 1, mask=count > 0, other=0)
        last_rows = gl.where(count > 0, gl.minimum(BLOCK_KV, num_other - last * BLOCK_KV), 0)
        steps = _num_steps(count, last_rows, 64, BLOCK_KV)
        column_steps = _num_column_steps(count, num_other_blocks, 64)
        mbarrier.wait(q_free, q_phase)
        _send(box_s.index(0), tile)
        _send(box_s.index(1), steps)
        _send(box_s.index(2), column_steps)
        mbarrier.expect(q_full, Q_BYTES)
        for i in gl.static_range(GROUPS):
            start = tile % num_own_blocks * BLOCK_Q + i * 64
            tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], q_full, q_s.index(i))
            tma.async_copy_global_to_shared(grad_desc, [b, h, start, 0], q_full, grad_s.index(i))
        q_phase ^= 1
        for i in range(steps):
            start, _ = _step_starts(list_ptr, count, i, 64, BLOCK_KV)
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(full.index(stage), BYTES)
            k = k_s.index(stage)
            v = v_s.index(stage)
            tma.async_copy_global_to_shared(k_desc, [b, h, start, 0], full.index(stage), k)
            tma.async_copy_global_to_shared(v_desc, [b, h, start, 0], full.index(stage), v)
            stage, phase = advance(stage, phase, STAGES)
        if COLUMNS:
            for i in range(column_steps):
                mbarrier.wait(free.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, BYTES)
                at = [b, h, i * 64, 0]
                tma.async_copy_global_to_shared(k_mean_desc, at, bar, k_s.index(stage))
                tma.async_copy_global_to_shared(v_mean_desc, at, bar, v_s.index(stage))
                stage, phase = advance(stage, phase, STAGES)
        tile += gl.num_programs(0)
    mbarrier.wait(q_free, q_phase)
    _send(box_s.index(0), num_tiles)
    mbarrier.arrive(q_full, count=1)


@gluon.jit
def _dq_step(
    dq, q, grad, lse, delta, ring, stage, phase, scale_log2, columns_ptr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Add what one tile of keys, or with COLUMNS of centroids, gives to dQ / scale."""
    k_s, v_s, full, free = ring
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    mbarrier.wait(full.index(stage), phase)
    k = k_s.index(stage).reshape([64, HEAD_DIM])
    v = v_s.index(stage).reshape([64, HEAD_DIM])
    zero = gl.zeros([64, 64], gl.float32, LOGITS)
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp_token = warpgroup_mma(grad, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    if COLUMNS:
        bias = gl.load(columns_ptr + gl.arange(0, 64, layout=gl.SliceLayout(0, LOGITS)))
    s = warpgroup_mma_wait(1, deps=[s_token])
    s = s * scale_log2
    if COLUMNS:
        s += bias[None, :]
    # P <= 1, but a row of 0 past the end may give more, even inf, which 0 cannot undo.
    prob = gl.exp2(gl.minimum(s - lse[:, None], 0.0))
    mbarrier.wait(full.index(stage), phase)
    dp, prob = warpgroup_mma_wait(0, deps=[dp_token, prob])
    ds = gl.convert_layout((prob * (dp - delta[:, None])).to(k_s.dtype), OPERAND)
    dq_token = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq_token])
    mbarrier.arrive(free.index(stage), count=1)
    stage, phase = advance(stage, phase, STAGES)
    return dq, stage, phase


@gluon.jit
def _dq_consumer(
    arguments, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    (
        dq_desc, row_ptr, columns_ptr, q_s, grad_s, k_s, v_s, box_s, q_full, q_free, full, free,
        num_heads, num_own, num_own_blocks, column_tiles, num_tiles, scale,
    ) = arguments  # fmt: skip
    ring = (k_s, v_s, full, free)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dtype: gl.constexpr = dq_desc.dtype
    scale_log2 = scale * _LOG2_E
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LOGITS))
    q = q_s.index(GROUP).reshape([64, HEAD_DIM])
    grad = grad_s.index(GROUP).reshape([64, HEAD_DIM])
    stage = 0
    phase = 0
    q_phase = 0
    mbarrier.wait(q_full, q_phase)
    tile = _receive(box_s.index(0))
    while tile < num_tiles:
        steps = _receive(box_s.index(1))
        head = tile // num_own_blocks
        start = tile % num_own_blocks * BLOCK_Q + GROUP * 64
        rows = head.to(gl.int64) * ((num_own + 63) // 64) + start // 64
        inside = start < num_own
        lse = gl.load(row_ptr + rows * 128 + row, mask=inside, other=0.0)
        delta = gl.load(row_ptr + rows * 128 + 64 + row, mask=inside, other=0.0)
        dq = gl.zeros([64, HEAD_DIM], gl.float32, ACC)
        for _ in range(steps):
            dq, stage, phase = _dq_step(
                dq, q, grad, lse, delta, ring, stage, phase, scale_log2, columns_ptr,
                HEAD_DIM, STAGES, False,
            )  # fmt: skip
        if COLUMNS:
            lse = gl.where(lse == float("-inf"), float("inf"), lse)  # no key at all: P = 0
            columns = columns_ptr + tile.to(gl.int64) * (column_tiles * 128)
            for i in range(_receive(box_s.index(2))):
                dq, stage, phase = _dq_step(
                    dq, q, grad, lse, delta, ring, stage, phase, scale_log2, columns + i * 64,
                    HEAD_DIM, STAGES, True,
                )  # fmt: skip
        q.store((dq * scale).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            dq_desc, [head // num_heads, head % num_heads, start, 0], q_s.index(GROUP)
        )
        tma.store_wait(0)
        mbarrier.arrive(q_free, count=1)
        q_phase ^= 1
        mbarrier.wait(q_full, q_phase)
        tile = _receive(box_s.index(0))


@gluon.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dq(
    q_desc, k_desc, v_desc, grad_desc, dq_desc, k_mean_desc, v_mean_desc, columns_ptr, row_ptr,
    num_blocks_ptr, indices_ptr, num_heads, num_own, num_other, num_own_blocks, num_other_blocks,
    column_tiles, num_tiles, scale,
    BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    grad_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, HEAD_DIM], v_desc.layout)
    box_s = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    producer = (
        q_desc, grad_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, q_s, grad_s, k_s, v_s, box_s,
        q_full, q_free, full, free, num_blocks_ptr, indices_ptr, num_heads, num_other,
        num_own_blocks, num_other_blocks, num_tiles,
    )  # fmt: skip
    consumer = (
        dq_desc, row_ptr, columns_ptr, q_s, grad_s, k_s, v_s, box_s, q_full, q_free, full, free,
        num_heads, num_own, num_own_blocks, column_tiles, num_tiles, scale,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_dq_consumer, (consumer, 0, BLOCK_Q, HEAD_DIM, STAGES, COLUMNS)),
            (_dq_consumer, (consumer, 1, BLOCK_Q, HEAD_DIM, STAGES, COLUMNS)),
            (_dq_producer, (producer, BLOCK_Q, BLOCK_KV, GROUPS, STAGES, COLUMNS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_dq_consumer, (consumer, 0, BLOCK_Q, HEAD_DIM, STAGES, COLUMNS)),
            (_dq_producer, (producer, BLOCK_Q, BLOCK_KV, GROUPS, STAGES, COLUMNS)),
        ], [1], [24])  # fmt: skip


@gluon.jit
def _dkv_producer(
    arguments, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    (
        q_desc, grad_desc, row_desc, k_desc, v_desc, q_s, grad_s, row_s, k_s, v_s, box_s, kv_full,
        kv_free, full, free, order_ptr, num_blocks_ptr, indices_ptr, num_heads,
        num_other, num_own_blocks, num_other_blocks, num_tiles,
    ) = arguments  # fmt: skip
    KV_BYTES: gl.constexpr = 2 * GROUPS * k_desc.block_type.nbytes
    BYTES: gl.constexpr = 2 * q_desc.block_type.nbytes + row_desc.block_type.nbytes
    stage = 0
    phase = 1
    kv_phase = 1
    slot = gl.program_id(0)
    while slot < num_tiles:
        tile = gl.load(order_ptr + slot)
        head = tile // num_own_blocks
        b = head // num_heads
        h = head % num_heads
        count = gl.load(num_blocks_ptr + tile)
        list_ptr = indices_ptr + tile.to(gl.int64) * num_other_blocks
        last = gl.load(list_ptr + count - 1, mask=count > 0, other=0)
        last_rows = gl.where(count > 0, gl.minimum(BLOCK_Q, num_other - last * BLOCK_Q), 0)
        steps = _num_steps(count, last_rows, 64, BLOCK_Q)
        mbarrier.wait(kv_free, kv_phase)
        _send(box_s.index(0), tile)
        _send(box_s.index(1), steps)
        mbarrier.expect(kv_full, KV_BYTES)
        for i in gl.static_range(GROUPS):
            start = tile % num_own_blocks * BLOCK_KV + i * 64
            tma.async_copy_global_to_shared(k_desc, [b, h, start, 0], kv_full, k_s.index(i))
            tma.async_copy_global_to_shared(v_desc, [b, h, start, 0], kv_full, v_s.index(i))
        kv_phase ^= 1
        row_tiles = (num_other + 63) // 64
        for i in range(steps):
            start, _ = _step_starts(list_ptr, count, i, 64, BLOCK_Q)
            mbarrier.wait(free.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], bar, q_s.index(stage))
            tma.async_copy_global_to_shared(grad_desc, [b, h, start, 0], bar, grad_s.index(stage))
            at = head * row_tiles + start // 64
            tma.async_copy_global_to_shared(row_desc, [at, 0], bar, row_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        slot += gl.num_programs(0)
    mbarrier.wait(kv_free, kv_phase)
    _send(box_s.index(0), num_tiles)
    mbarrier.arrive(kv_full, count=1)


@gluon.jit
def _share_of_mean(
    parts_ptr, block, num_rows, num_parts, num_blocks,
    ACC: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Return the share [1, HEAD_DIM] that each row of a block has of the gradient of its mean."""
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ACC))
    total = gl.zeros([HEAD_DIM], gl.float32, gl.SliceLayout(0, ACC))
    for i in range(num_parts):
        row = i.to(gl.int64) * num_blocks + block
        total += gl.load(parts_ptr + row * HEAD_DIM + dim)
    return (total / num_rows.to(gl.float32))[None, :]


@gluon.jit
def _dkv_consumer(
    arguments, GROUP: gl.constexpr, BLOCK_KV: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    (
        dk_desc, dv_desc, dk_parts_ptr, dv_parts_ptr, q_s, grad_s, row_s, k_s, v_s, box_s, kv_full,
        kv_free, full, free, num_heads, num_own, num_own_blocks, num_parts, num_tiles, scale,
    ) = arguments  # fmt: skip
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    dtype: gl.constexpr = dk_desc.dtype
    scale_log2 = scale * _LOG2_E
    k = k_s.index(GROUP).reshape([64, HEAD_DIM])
    v = v_s.index(GROUP).reshape([64, HEAD_DIM])
    stage = 0
    phase = 0
    kv_phase = 0
    mbarrier.wait(kv_full, kv_phase)
    tile = _receive(box_s.index(0))
    while tile < num_tiles:
        steps = _receive(box_s.index(1))
        dk = gl.zeros([64, HEAD_DIM], gl.float32, ACC)
        dv = gl.zeros([64, HEAD_DIM], gl.float32, ACC)
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            q = q_s.index(stage).reshape([64, HEAD_DIM])
            grad = grad_s.index(stage).reshape([64, HEAD_DIM])
            row = row_s.index(stage).reshape([128])
            zero = gl.zeros([64, 64], gl.float32, LOGITS)
            s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(v, grad.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            lse = row.slice(0, 64).load(COLUMN)
            # Rows of 0 past the end add 0 whatever P is, unless it is inf.
            prob = gl.exp2(gl.minimum(s * scale_log2 - lse[None, :], 0.0))
            mbarrier.wait(full.index(stage), phase)
            dp, prob = warpgroup_mma_wait(0, deps=[dp_token, prob])
            dv_token = warpgroup_mma(
                gl.convert_layout(prob.to(dtype), OPERAND), grad, dv, is_async=True
            )
            delta = row.slice(64, 64).load(COLUMN)
            ds = prob * (dp - delta[None, :])
            dk_token = warpgroup_mma(gl.convert_layout(ds.to(dtype), OPERAND), q, dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv_token, dk_token])
            mbarrier.arrive(free.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        head = tile // num_own_blocks
        b = head // num_heads
        h = head % num_heads
        start = tile % num_own_blocks * BLOCK_KV
        if COLUMNS:
            num_rows = gl.minimum(BLOCK_KV, num_own - start)
            dv += _share_of_mean(dv_parts_ptr, tile, num_rows, num_parts, num_tiles, ACC, HEAD_DIM)
            v.store(dv.to(dtype))
            dk += _share_of_mean(dk_parts_ptr, tile, num_rows, num_parts, num_tiles, ACC, HEAD_DIM)
        else:
            v.store(dv.to(dtype))
        k.store((dk * scale).to(dtype))
        start += GROUP * 64
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_desc, [b, h, start, 0], k_s.index(GROUP))
        tma.async_copy_shared_to_global(dv_desc, [b, h, start, 0], v_s.index(GROUP))
        tma.store_wait(0)
        mbarrier.arrive(kv_free, count=1)
        kv_phase ^= 1
        mbarrier.wait(kv_full, kv_phase)
        tile = _receive(box_s.index(0))


@gluon.jit(do_not_specialize=_RUN_TIME)
def _block_sparse_attention_bwd_dkv(
    q_desc, k_desc, v_desc, grad_desc, row_desc, dk_desc, dv_desc, dk_parts_ptr, dv_parts_ptr,
    order_ptr, num_blocks_ptr, indices_ptr, num_heads, num_own, num_other, num_own_blocks,
    num_other_blocks, num_parts, num_tiles, scale,
    BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    k_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, HEAD_DIM], k_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, HEAD_DIM], q_desc.layout)
    grad_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 64, HEAD_DIM], q_desc.layout)
    row_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], row_desc.layout)
    box_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_free, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    producer = (
        q_desc, grad_desc, row_desc, k_desc, v_desc, q_s, grad_s, row_s, k_s, v_s, box_s, kv_full,
        kv_free, full, free, order_ptr, num_blocks_ptr, indices_ptr, num_heads,
        num_other, num_own_blocks, num_other_blocks, num_tiles,
    )  # fmt: skip
    consumer = (
        dk_desc, dv_desc, dk_parts_ptr, dv_parts_ptr, q_s, grad_s, row_s, k_s, v_s, box_s, kv_full,
        kv_free, full, free, num_heads, num_own, num_own_blocks, num_parts, num_tiles, scale,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_dkv_consumer, (consumer, 0, BLOCK_KV, HEAD_DIM, STAGES, COLUMNS)),
            (_dkv_consumer, (consumer, 1, BLOCK_KV, HEAD_DIM, STAGES, COLUMNS)),
            (_dkv_producer, (producer, BLOCK_Q, BLOCK_KV, GROUPS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_dkv_consumer, (consumer, 0, BLOCK_KV, HEAD_DIM, STAGES, COLUMNS)),
            (_dkv_producer, (producer, BLOCK_Q, BLOCK_KV, GROUPS, STAGES)),
        ], [1], [24])  # fmt: skip


class _Config(NamedTuple):
    step: int  # rows of the other side that a program meets at a time
    stages: int  # depth of the ring of such tiles, at head dim 128
    programs: int  # that fit on a multiprocessor
    stays: bool = False  # as many programs as fit, each of many tiles; else one program a tile


# By rows of the block that a program owns. 64 rows take one consumer warpgroup, 128 rows two.
_FWD = {64: _Config(64, 3, 2), 128: _Config(128, 2, 1, stays=True)}
_BWD_DQ = {64: _Config(64, 2, 2), 128: _Config(64, 4, 1)}
_BWD_DKV = {64: _Config(64, 2, 2), 128: _Config(64, 4, 1)}


class Centroids(NamedTuple):
    """Centroids that join the softmax, one of each kv block."""

    k: Tensor  # [B, H, Nk, D], in q's type
    v: Tensor  # [B, H, Nk, D]
    columns: Tensor  # fp32 [B, H, Nq, Nk and padding]: added to their logits, in units of log2


class CentroidGradients(NamedTuple):
    """Gradients of the centroids: fp32 parts [parts, B, H, Nk, D], to be summed in order."""

    dk: Tensor  # / scale
    dv: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    scale: float,
    centroids: Centroids | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D], strided like q, and lse [B, H, Sq], without autograd.

    With centroids, each is one more key; its column is -inf where its block is selected.
    """
    q, k, v = (aligned(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = _FWD[blocks.q_block_size]
    rows = min(config.step, blocks.kv_block_size)
    num_tiles = blocks.kv_num_blocks.numel()
    tiles = [describe_rows(x, n) for x, n in ((q, 64), (k, rows), (v, rows), (out, 64))]
    if centroids is None:
        means, columns, column_tiles = tiles[1:3], lse, 0  # none of them is read
    else:
        means = [describe_rows(x, config.step) for x in (centroids.k, centroids.v)]
        columns, column_tiles = centroids.columns, centroids.columns.shape[3] // 128
    with on_device(q.device):
        _block_sparse_attention_fwd[_grid(q, num_tiles, config)](
            *tiles, *means, columns, lse, by_length(blocks.kv_num_blocks),
            blocks.kv_num_blocks, blocks.kv_indices, q.shape[1], q.shape[2], k.shape[2],
            *blocks.kv_indices.shape[2:], column_tiles, num_tiles, scale * _LOG2_E.value,
            STEP=config.step, COLUMNS=centroids is not None,
            **_meta(q, blocks, blocks.q_block_size, config),
        )  # fmt: skip
    return out, lse


class RowTerms(NamedTuple):
    """What the backward needs to know of each query."""

    rows: Tensor  # fp32 [B * H * tiles of 64 queries, 128]: lse * log2(e), then D
    delta: Tensor  # fp32 [B, H, Sq]: D


def row_terms(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> RowTerms:
    """Return lse and D = rowsum(dO * O) - dLSE of each query."""
    batch, num_heads, num_q, head_dim = out.shape
    row_tiles = -(-num_q // 64)
    rows = lse.new_empty((batch * num_heads * row_tiles, 128))
    delta = torch.empty_like(lse)
    with on_device(out.device):
        _delta[(row_tiles, batch * num_heads)](
            out, grad_out, lse, grad_lse, rows, delta, *out.stride()[:3], *grad_out.stride()[:3],
            num_heads, num_q, row_tiles, HEAD_DIM=head_dim,
        )  # fmt: skip
    return RowTerms(rows, delta)


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
    terms: RowTerms | None = None,
    centroids: tuple[Centroids, CentroidGradients] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, strided like q, k, v; with centroids, what goes through them is added."""
    q, k, v, grad_out = (aligned(x) for x in (q, k, v, grad_out))
    rows = (terms or row_terms(grad_out, grad_lse, out, lse)).rows
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    num_heads, num_q, num_kv = q.shape[1], q.shape[2], k.shape[2]
    q_blocks, kv_blocks = blocks.kv_indices.shape[2:]
    tiles = [describe_rows(x, 64) for x in (q, k, v, grad_out)]
    if centroids is None:
        means, columns, column_tiles = tiles[1:3], rows, 0  # none of them is read
        dk_parts = dv_parts = rows
        num_parts = 0
    else:
        (k_mean, v_mean, columns), (dk_parts, dv_parts) = centroids
        means = [describe_rows(x, 64) for x in (k_mean, v_mean)]
        column_tiles, num_parts = columns.shape[3] // 128, dk_parts.shape[0]
    with on_device(q.device):
        config = _BWD_DQ[blocks.q_block_size]
        num_tiles = blocks.kv_num_blocks.numel()
        _block_sparse_attention_bwd_dq[_grid(q, num_tiles, config)](
            *tiles, describe_rows(dq, 64), *means, columns, rows,
            blocks.kv_num_blocks, blocks.kv_indices, num_heads, num_q, num_kv,
            q_blocks, kv_blocks, column_tiles, num_tiles, scale,
            COLUMNS=centroids is not None, **_meta(q, blocks, blocks.q_block_size, config),
        )  # fmt: skip
        config = _BWD_DKV[blocks.kv_block_size]
        num_tiles = blocks.q_num_blocks.numel()
        order = outliers_first(blocks.q_num_blocks, blocks.q_indices.shape[3])
        _block_sparse_attention_bwd_dkv[_grid(q, num_tiles, config)](
            *tiles, describe_matrix(rows, 1), describe_rows(dk, 64), describe_rows(dv, 64),
            dk_parts, dv_parts, order, blocks.q_num_blocks, blocks.q_indices,
            num_heads, num_kv, num_q, kv_blocks, q_blocks, num_parts, num_tiles, scale,
            COLUMNS=centroids is not None, **_meta(q, blocks, blocks.kv_block_size, config),
        )  # fmt: skip
    return dq, dk, dv


def _meta(q: Tensor, blocks: Blocks, own: int, config: _Config) -> dict[str, Any]:
    groups = own // 64
    return {
        "BLOCK_Q": blocks.q_block_size,
        "BLOCK_KV": blocks.kv_block_size,
        "HEAD_DIM": q.shape[-1],
        "GROUPS": groups,
        "STAGES": config.stages * (128 // q.shape[-1]),
        "REGISTERS": 240,
        "num_warps": 4,
        "maxnreg": 168 if config.programs == 1 else 128,
    }


def _grid(q: Tensor, num_tiles: int, config: _Config) -> tuple[int]:
    if not config.stays:
        return (num_tiles,)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return (min(processors * config.programs, num_tiles),)
