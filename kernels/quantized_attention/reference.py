"""Quantised block-sparse attention in plain PyTorch: what the kernels must compute.

With c = scale * log2(e), means over a sample of the tokens, and one scale per query and kv block:
    k8 = round((k - k_mean) / k_scale)      v8 = e4m3((v - v_mean) * 2^-v_exponent)
    L = c * q_scale * k_scale * (q8 k8^T) + v_exponent       peak = ceil(max over the row of L)
    P = 2^(L - peak + 8)         total = sum of P * 2^-v_exponent
    out = e4m3(P) v8 / total + v_mean       lse = ln(2) (peak - 8 + log2(total)) + scale * q k_mean
(SageAttention, arXiv 2410.02367; 2411.10958). A constant added to every key or value leaves the
attention alone but for the last terms, so any sample does. Values whose block has a small scale
get small weights, hence v_exponent in L. Scales of P are powers of two: rounding to e4m3 is the
same at the running peak of a kernel and at the final one, except below the normal numbers.
"""

import math

import torch
from torch import Tensor

from ..blocks import Blocks
from ..quantized import (
    MAX_SAMPLE,
    MIN_SCALE,
    PEAK_EXPONENT,
    Quantized,
    sample_step,
    slot_order,
)

_E4M3_MAX = 448.0


def quantize(k: Tensor, v: Tensor, blocks: Blocks, qk: str, pv: str) -> Quantized:
    """Return k and v, smoothed and quantised per kv block."""
    size = max(32, 1 << (blocks.kv_block_size - 1).bit_length())  # T
    k_mean, v_mean = _sample_mean(k), _sample_mean(v)
    slabs = _slabs(k.float() - k_mean[:, :, None], blocks.kv_offsets, size)  # [B, H, Nk, T, D]
    k8, k_scale = _round(slabs, qk, (-1, -2))
    if pv == "none":
        return Quantized(
            k=k8,
            k_scale=k_scale,
            k_mean=k_mean,
            v=v,
            v_exponent=torch.zeros_like(k_scale),
            v_mean=torch.zeros_like(v_mean),
            num_tokens=k.shape[2],
        )
    slabs = _slabs(v.float() - v_mean[:, :, None], blocks.kv_offsets, size)
    largest = (slabs.abs().amax((-1, -2)) * (1 / _E4M3_MAX)).clamp(min=MIN_SCALE)
    v_exponent = ((largest.view(torch.int32) + 0x7FFFFF) >> 23) - 127  # ceil(log2(largest))
    v8 = _e4m3(torch.ldexp(slabs, -v_exponent[..., None, None]))
    return Quantized(
        k=k8,
        k_scale=k_scale,
        k_mean=k_mean,
        v=slot_order(v8.mT).contiguous(),
        v_exponent=v_exponent.float(),
        v_mean=v_mean,
        num_tokens=k.shape[2],
    )


def forward(q: Tensor, quantized: Quantized, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] in q's dtype and lse [B, H, Sq] in fp32."""
    num_slots = quantized.k.shape[3]
    sizes = blocks.kv_offsets.diff()
    present = torch.arange(num_slots, device=q.device) < sizes[:, None]  # [Nk, T]
    q_sizes = blocks.q_offsets.diff()
    k8 = quantized.k.float().flatten(2, 3)  # [B, H, Nk * T, D]
    v8 = _values(quantized, blocks)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    selected = blocks.selected()
    is_fp8 = quantized.v.dtype == torch.float8_e4m3fn
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        wide = q[b, h].float()
        q8, q_scale = _round(wide, "int8" if quantized.k.dtype == torch.int8 else "fp8", -1)
        factor = q_scale[:, None] * (scale * math.log2(math.e))
        exponent = quantized.v_exponent[b, h].repeat_interleave(num_slots)
        logits = q8.float() @ k8[b, h].T  # exact for int8
        logits = logits * (factor * quantized.k_scale[b, h].repeat_interleave(num_slots)) + exponent
        seen = (selected[b, h, :, :, None] & present).flatten(1)  # [Nq, Nk * T]
        seen = seen.repeat_interleave(q_sizes, 0, output_size=q.shape[2])
        logits = logits.masked_fill(~seen, float("-inf"))
        peak = logits.amax(-1, keepdim=True).ceil()
        base = peak.masked_fill(peak == float("-inf"), 0) - PEAK_EXPONENT
        prob = torch.exp2(logits - base)
        total = (prob * torch.exp2(-exponent)).sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1)
        weight = _e4m3(prob).float() if is_fp8 else prob
        mean = quantized.v_mean[b, h]
        out[b, h] = (weight @ v8[b, h] / total + mean).masked_fill(empty, 0).to(q.dtype)
        shift = scale * (wide @ quantized.k_mean[b, h])
        natural = ((base + total.log2()) * math.log(2)).squeeze(-1) + shift
        lse[b, h] = natural.masked_fill(empty.squeeze(-1), float("-inf"))
    return out, lse


def _sample_mean(x: Tensor) -> Tensor:
    """Mean over at most MAX_SAMPLE tokens, fp32 [B, H, D]."""
    num_tokens = x.shape[2]
    sample = torch.arange(min(num_tokens, MAX_SAMPLE), device=x.device)
    return x[:, :, sample * sample_step(num_tokens) % num_tokens].float().mean(2)


def _slabs(x: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Give every block its own slab of `size` slots: [B, H, S, D] -> [B, H, N, size, D]."""
    slot = torch.arange(size, device=x.device)
    token = offsets[:-1, None] + slot  # [N, size]
    absent = slot >= offsets.diff()[:, None]
    slabs = x[:, :, token.clamp(max=x.shape[2] - 1).long()]
    return slabs.masked_fill(absent[..., None], 0)


def _values(quantized: Quantized, blocks: Blocks) -> Tensor:
    """Values over 2^v_exponent in token order, fp32 [B, H, Nk * T, D]."""
    if quantized.v.dtype != torch.float8_e4m3fn:
        return _slabs(quantized.v.float(), blocks.kv_offsets, quantized.k.shape[3]).flatten(2, 3)
    in_order = quantized.v.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)
    return in_order.mT.flatten(2, 3)


def _round(x: Tensor, kind: str, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return x over its scale, rounded, and the scale: the largest magnitude over `dim` fits."""
    limit = 127.0 if kind == "int8" else _E4M3_MAX
    scale = (x.abs().amax(dim, keepdim=True) * (1 / limit)).clamp(min=MIN_SCALE)
    scaled = x * (1 / scale)
    rounded = scaled.round().to(torch.int8) if kind == "int8" else _e4m3(scaled)
    return rounded, scale.squeeze(dim)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)  # PyTorch's cast gives NaN
