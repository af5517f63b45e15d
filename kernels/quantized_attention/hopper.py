"""Quantised block-sparse attention on Hopper (sm_90), in Gluon; formulas in reference.py.

A producer warp walks the index lists and keeps a ring of key and value slabs full with TMA copies;
one or two consumer warpgroups of 64 rows each round their queries once a tile and then keep the
tensor cores busy with asynchronous wgmma: the logits of one step are computed while the weights of
the step before meet their values. Lists are walked from their end: only the first step can hold
absent keys.

For Triton 3.6: the exponentials would sink below the next wgmma wait, and nothing would overlap. So
the wait takes them as a dependency, and an mbarrier wait (the end of a basic block) stands before
it. A name assigned from another before a loop and again inside it must be copied with `+ 0`.
"""

from typing import Any, NamedTuple

import torch
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
from ..quantized import MIN_SCALE, PEAK_EXPONENT, Quantized
from ..tma import advance, aligned, describe_matrix, describe_rows

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_MIN_SCALE = gl.constexpr(MIN_SCALE)
_PEAK_EXPONENT = gl.constexpr(PEAK_EXPONENT)
_TO_INTEGER = gl.constexpr(1.5 * 2**23)  # the sum's low bits are the rounded number

_RUN_TIME = ["num_heads", "num_q", "num_kv", "num_q_blocks", "num_kv_blocks", "num_tiles"]


@gluon.jit
def _num_steps(count, PAIR: gl.constexpr):
    """How many steps of PAIR blocks cover a list; at least one, which then holds no key."""
    return gl.maximum((count + PAIR - 1) // PAIR, 1)


@gluon.jit
def _producer(
    arguments, BLOCK_Q: gl.constexpr, SLOTS: gl.constexpr, PAIR: gl.constexpr,
    HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    (
        q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free,
        num_blocks_ptr, indices_ptr, num_heads, num_q_blocks, num_kv_blocks, num_tiles,
    ) = arguments  # fmt: skip
    Q_BYTES: gl.constexpr = GROUPS * q_desc.block_type.nbytes
    KV_BYTES: gl.constexpr = PAIR * SLOTS * HEAD_DIM
    stage = 0
    phase = 1
    q_phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head = tile // num_q_blocks
        b = head // num_heads
        h = head % num_heads
        count = gl.load(num_blocks_ptr + tile)
        list_ptr = indices_ptr + tile.to(gl.int64) * num_kv_blocks
        mbarrier.wait(q_free, q_phase)
        mbarrier.expect(q_full, Q_BYTES)
        for i in gl.static_range(GROUPS):
            start = tile % num_q_blocks * BLOCK_Q + i * 64
            tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], q_full, q_s.index(i))
        q_phase ^= 1
        steps = _num_steps(count, PAIR)
        for i in range(steps):
            at = (steps - 1 - i) * PAIR
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), KV_BYTES)
            for j in gl.static_range(PAIR):
                slab = head * num_kv_blocks + gl.load(
                    list_ptr + at + j, mask=at + j < count, other=0
                )
                tma.async_copy_global_to_shared(
                    k_desc, [slab * SLOTS, 0], k_full.index(stage),
                    k_s.index(stage).slice(j * SLOTS, SLOTS, 0),
                )  # fmt: skip
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), KV_BYTES)
            for j in gl.static_range(PAIR):
                slab = head * num_kv_blocks + gl.load(
                    list_ptr + at + j, mask=at + j < count, other=0
                )
                tma.async_copy_global_to_shared(
                    v_desc, [slab * HEAD_DIM, 0], v_full.index(stage),
                    v_s.index(stage * PAIR + j),
                )  # fmt: skip
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _scalars(list_ptr, k_scale_ptr, v_exponent_ptr, at, count, PAIR: gl.constexpr):
    """Scale and exponent of the blocks at position `at` and, of a pair, at + 1."""
    block = gl.load(list_ptr + at, mask=at < count, other=0)
    k0 = gl.load(k_scale_ptr + block)
    v0 = gl.load(v_exponent_ptr + block)
    if PAIR == 1:
        return k0, k0, v0, v0
    else:
        block = gl.load(list_ptr + at + 1, mask=at + 1 < count, other=0)
        return k0, gl.load(k_scale_ptr + block), v0, gl.load(v_exponent_ptr + block)


@gluon.jit
def _exponentials(
    s, factor, k0, k1, v0, v1, peak, FIRST: gl.constexpr, PAIR: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """P of one step, the peak it is relative to, and its row sums; s holds q8 k8^T."""
    if PAIR == 1:
        step = factor * k0
        new_peak = gl.maximum(peak, gl.ceil(gl.max(s, axis=1) * step + v0))
        base = new_peak
        if FIRST:  # no key at all: keep -inf - (-inf) out of exp2
            base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = gl.exp2(s * step[:, None] - (base - (v0 + _PEAK_EXPONENT))[:, None])
        return prob, new_peak, gl.sum(prob, axis=1) * gl.exp2(-v0)
    else:
        half = gl.arange(0, 2 * SLOTS, layout=gl.SliceLayout(0, s.type.layout)) // SLOTS
        step = factor[:, None] * gl.where(half == 0, k0, k1)[None, :]
        exponent = gl.where(half == 0, v0, v1)[None, :]
        new_peak = gl.maximum(peak, gl.ceil(gl.max(s * step + exponent, axis=1)))
        base = new_peak
        if FIRST:
            base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = gl.exp2(s * step - (base[:, None] - (exponent + _PEAK_EXPONENT)))
        return prob, new_peak, gl.sum(prob * gl.exp2(-exponent), axis=1)


@gluon.jit
def _weights(prob, STEP: gl.constexpr):
    """Round to e4m3 and take the columns in slot_order: no value leaves its thread."""
    weight = prob.to(gl.float8e4nv).reshape([64, STEP // 16, 2, 4, 2])
    return weight.permute((0, 1, 3, 2, 4)).reshape([64, STEP])


@gluon.jit
def _add_values(
    weight, v_s, stage, acc, PAIR: gl.constexpr, SLOTS: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """Start acc + weight v: as many wgmma groups as a step has blocks.

    The tensor cores keep some 14 bits of a running fp8 sum: after N keys it may be off by
    N / 32 * 2^-14, far less than the rounding to e4m3 of the few thousand keys of a sparse row.
    """
    if PAIR == 1:
        a = gl.convert_layout(weight, P)
        return warpgroup_mma(a, v_s.index(stage).permute((1, 0)), acc, is_async=True)
    else:
        low, high = weight.reshape([64, 2, SLOTS]).permute((0, 2, 1)).split()
        a = gl.convert_layout(low, P)
        token = warpgroup_mma(a, v_s.index(2 * stage).permute((1, 0)), acc, is_async=True)
        a = gl.convert_layout(high, P)
        return warpgroup_mma(a, v_s.index(2 * stage + 1).permute((1, 0)), token, is_async=True)


@gluon.jit
def _consumer(
    arguments, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, SLOTS: gl.constexpr,
    PAIR: gl.constexpr, HEAD_DIM: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,

):  # fmt: skip
    (
        out_desc, lse_ptr, k_scale_ptr, k_mean_ptr, v_exponent_ptr, v_mean_ptr, q_s, q8_s, k_s, v_s,
        out_s, q_full, q_free, k_full, k_free, v_full, v_free, num_blocks_ptr, indices_ptr,
        num_heads, num_q, num_kv, num_q_blocks, num_kv_blocks, num_tiles, scale,
    ) = arguments  # fmt: skip
    STEP: gl.constexpr = SLOTS * PAIR
    INT8: gl.constexpr = q8_s.dtype == gl.int8
    LIMIT: gl.constexpr = 127.0 if INT8 else 448.0
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    S_TYPE: gl.constexpr = gl.int32 if INT8 else gl.float32
    half = gl.arange(0, STEP, layout=gl.SliceLayout(0, S)) // SLOTS
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, S)) % SLOTS
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    q8 = q8_s.index(GROUP)
    stage = 0
    phase = 0
    q_phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head = tile // num_q_blocks
        count = gl.load(num_blocks_ptr + tile)
        list_ptr = indices_ptr + tile.to(gl.int64) * num_kv_blocks
        k_scales = k_scale_ptr + head * num_kv_blocks
        v_exponents = v_exponent_ptr + head * num_kv_blocks
        k_mean = gl.load(k_mean_ptr + head * HEAD_DIM + dim)
        steps = _num_steps(count, PAIR)
        at = (steps - 1) * PAIR
        k0, k1, v0, v1 = _scalars(list_ptr, k_scales, v_exponents, at, count, PAIR)
        mbarrier.wait(q_full, q_phase)
        q = q_s.index(GROUP).reshape([64, HEAD_DIM]).load(OUT).to(gl.float32)
        mbarrier.arrive(q_free, count=1)
        q_phase ^= 1
        q_scale = gl.maximum(gl.max(gl.abs(q), axis=1) * (1.0 / LIMIT), _MIN_SCALE)
        scaled = q * (1.0 / q_scale)[:, None]
        if INT8:
            q8.store((scaled + _TO_INTEGER).to(gl.int32, bitcast=True).to(gl.int8))
        else:
            q8.store(scaled.to(gl.float8e4nv))
        fence_async_shared()
        shift = gl.convert_layout(gl.sum(q * k_mean[None, :], axis=1) * scale, ROW)
        factor = gl.convert_layout(q_scale * (scale * _LOG2_E), ROW)

        mbarrier.wait(k_full.index(stage), phase)
        zero = gl.zeros([64, STEP], S_TYPE, S)
        k = k_s.index(stage).permute((1, 0))
        token = warpgroup_mma(q8, k, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[token]).to(gl.float32)
        mbarrier.arrive(k_free.index(stage), count=1)
        last = gl.load(list_ptr + count - 1, mask=count > 0, other=0)
        last_rows = gl.where(count > 0, gl.minimum(SLOTS, num_kv - last * SLOTS), 0)
        if PAIR == 1:
            rows = last_rows
        else:  # with an odd count the second block is missing
            is_alone = (count % 2 == 1) | (count == 0)
            low_rows = gl.where(is_alone, last_rows, SLOTS)
            rows = gl.where(half == 0, low_rows, gl.where(is_alone, 0, last_rows))
        s = gl.where((column < rows)[None, :], s, float("-inf"))
        empty = gl.full([64], float("-inf"), gl.float32, ROW)
        prob, peak, total = _exponentials(s, factor, k0, k1, v0, v1, empty, True, PAIR, SLOTS)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, OUT)
        at -= PAIR
        k0, k1, v0, v1 = _scalars(list_ptr, k_scales, v_exponents, gl.maximum(at, 0), count, PAIR)
        next_stage, next_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=steps > 1)
        for i in range(1, steps):
            v_stage = stage + 0
            v_phase = phase + 0
            stage = next_stage
            phase = next_phase
            weight = _weights(prob, STEP)
            zero = gl.zeros([64, STEP], S_TYPE, S)
            k = k_s.index(stage).permute((1, 0))
            token = warpgroup_mma(q8, k, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            acc_token = _add_values(weight, v_s, v_stage, acc, PAIR, SLOTS, P)
            # Load the scalars of the step after this one while the tensor cores work.
            at -= PAIR
            n0, n1, e0, e1 = _scalars(
                list_ptr, k_scales, v_exponents, gl.maximum(at, 0), count, PAIR
            )
            s = warpgroup_mma_wait(PAIR, deps=[token]).to(gl.float32)
            mbarrier.arrive(k_free.index(stage), count=1)
            prob, new_peak, part_total = _exponentials(
                s, factor, k0, k1, v0, v1, peak, False, PAIR, SLOTS
            )
            decay = gl.exp2(peak - new_peak)
            total = total * decay + part_total
            peak = new_peak
            k0 = n0
            v0 = e0
            if PAIR == 2:
                k1 = n1
                v1 = e1
            next_stage, next_phase = advance(stage, phase, STAGES)
            mbarrier.wait(k_full.index(next_stage), next_phase, pred=i + 1 < steps)
            acc, prob, total, decay = warpgroup_mma_wait(0, deps=[acc_token, prob, total, decay])
            mbarrier.arrive(v_free.index(v_stage), count=1)
            acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
        weight = _weights(prob, STEP)
        mbarrier.wait(v_full.index(stage), phase)
        acc_token = _add_values(weight, v_s, stage, acc, PAIR, SLOTS, P)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        mbarrier.arrive(v_free.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)

        is_empty = total == 0.0
        total = gl.where(is_empty, 1.0, total)
        v_mean = gl.load(v_mean_ptr + head * HEAD_DIM + dim)
        acc = acc / gl.convert_layout(total, OUT_ROW)[:, None]
        acc += gl.where(gl.convert_layout(is_empty, OUT_ROW)[:, None], 0.0, v_mean[None, :])
        start = tile % num_q_blocks * BLOCK_Q + GROUP * 64
        row = start + gl.arange(0, 64, layout=ROW)
        lse = (peak + gl.log2(total) - _PEAK_EXPONENT) * _LN_2 + shift
        gl.store(lse_ptr + head.to(gl.int64) * num_q + row, lse, mask=row < num_q)
        tma.store_wait(0)
        out = out_s.index(GROUP)
        out.reshape([64, HEAD_DIM]).store(acc.to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out_desc, [head // num_heads, head % num_heads, start, 0], out
        )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_RUN_TIME)
def _quantized_attention_fwd(
    q_desc, k_desc, v_desc, out_desc, k_scale_ptr, k_mean_ptr, v_exponent_ptr, v_mean_ptr, lse_ptr,
    num_blocks_ptr, indices_ptr,
    num_heads, num_q, num_kv, num_q_blocks, num_kv_blocks, num_tiles, scale,
    BLOCK_Q: gl.constexpr, SLOTS: gl.constexpr, PAIR: gl.constexpr, HEAD_DIM: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    q8_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], gl.int8)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    out_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, HEAD_DIM], out_desc.layout)
    q8_s = gl.allocate_shared_memory(k_desc.dtype, [GROUPS, 64, HEAD_DIM], q8_layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, PAIR * SLOTS, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES * PAIR, HEAD_DIM, SLOTS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    producer = (
        q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free,
        num_blocks_ptr, indices_ptr, num_heads, num_q_blocks, num_kv_blocks, num_tiles,
    )  # fmt: skip
    consumer = (
        out_desc, lse_ptr, k_scale_ptr, k_mean_ptr, v_exponent_ptr, v_mean_ptr, q_s, q8_s, k_s, v_s,
        out_s, q_full, q_free, k_full, k_free, v_full, v_free, num_blocks_ptr, indices_ptr,
        num_heads, num_q, num_kv, num_q_blocks, num_kv_blocks, num_tiles, scale,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_consumer, (consumer, 0, BLOCK_Q, SLOTS, PAIR, HEAD_DIM, GROUPS, STAGES)),
            (_consumer, (consumer, 1, BLOCK_Q, SLOTS, PAIR, HEAD_DIM, GROUPS, STAGES)),
            (_producer, (producer, BLOCK_Q, SLOTS, PAIR, HEAD_DIM, GROUPS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (consumer, 0, BLOCK_Q, SLOTS, PAIR, HEAD_DIM, GROUPS, STAGES)),
            (_producer, (producer, BLOCK_Q, SLOTS, PAIR, HEAD_DIM, GROUPS, STAGES)),
        ], [1], [24])  # fmt: skip


class _Config(NamedTuple):
    stages: int  # depth of the ring of steps, at head dim 128
    programs: int  # per multiprocessor


# By rows of a q block. 64 rows take one consumer warpgroup, 128 rows two.
_FWD = {64: _Config(2, 2), 128: _Config(3, 1)}


def forward(q: Tensor, quantized: Quantized, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D], strided like q, and lse [B, H, Sq] in fp32."""
    q = aligned(q)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = _FWD[blocks.q_block_size]
    num_tiles = blocks.kv_num_blocks.numel()
    with on_device(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        _quantized_attention_fwd[(min(processors * config.programs, num_tiles),)](
            *_arguments(q, quantized, blocks, scale, out, lse),
            **_meta(q, quantized, blocks, config),
        )
    return out, lse


def _arguments(
    q: Tensor, quantized: Quantized, blocks: Blocks, scale: float, out: Tensor, lse: Tensor
) -> tuple[Any, ...]:
    slots, head_dim = quantized.k.shape[3:]
    return (
        describe_rows(q, 64), describe_matrix(quantized.k.flatten(0, 3), slots),
        describe_matrix(quantized.v.flatten(0, 3), head_dim), describe_rows(out, 64),
        quantized.k_scale, quantized.k_mean, quantized.v_exponent, quantized.v_mean, lse,
        blocks.kv_num_blocks, blocks.kv_indices,
        q.shape[1], q.shape[2], quantized.num_tokens, *blocks.kv_indices.shape[2:],
        blocks.kv_num_blocks.numel(), scale,
    )  # fmt: skip


def _meta(q: Tensor, quantized: Quantized, blocks: Blocks, config: _Config) -> dict[str, Any]:
    slots, head_dim = quantized.k.shape[3:]
    groups = blocks.q_block_size // 64
    return {
        "BLOCK_Q": blocks.q_block_size,
        "SLOTS": slots,
        "PAIR": 128 // slots,
        "HEAD_DIM": head_dim,
        "GROUPS": groups,
        "STAGES": config.stages,
        "REGISTERS": 240,
        "num_warps": 4,
        "maxnreg": 168 if config.programs == 1 else 128,
    }
