"""The compiled backends as PyTorch operators, with fakes for torch.compile; no autograd."""

from typing import Any

import torch
from torch import Tensor

from ..blocks import Blocks
from ..quantized import Quantized


@torch.library.custom_op("gossamer::quantize_keys_values", mutates_args=())
def _quantize(
    k: Tensor, v: Tensor, kv_offsets: Tensor, kv_block_size: int, qk: str, pv: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton

    k8, k_scale, k_mean, v8, v_exponent, v_mean = triton.quantize(
        k, v, kv_offsets, kv_block_size, qk, pv
    )
    return k8, k_scale, k_mean, v8, v_exponent, v_mean


@torch.library.custom_op("gossamer::quantized_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_mean: Tensor,
    v: Tensor,
    v_exponent: Tensor,
    v_mean: Tensor,
    num_tokens: int,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    quantized = Quantized(
        k=k,
        k_scale=k_scale,
        k_mean=k_mean,
        v=v,
        v_exponent=v_exponent,
        v_mean=v_mean,
        num_tokens=num_tokens,
    )
    blocks = Blocks(
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        q_num_blocks=kv_num_blocks,  # the transposed lists serve a backward only
        q_indices=kv_indices,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
    )
    match backend:
        case "hopper":
            from . import hopper

            return hopper.forward(q, quantized, blocks, scale)
        case _:
            from . import triton

            return triton.forward(q, quantized, blocks, scale)


@_quantize.register_fake
def _(
    k: Tensor, v: Tensor, kv_offsets: Tensor, kv_block_size: int, qk: str, pv: str
) -> tuple[Tensor, ...]:
    from . import triton

    return triton.empty_quantized(k, kv_offsets, kv_block_size, qk, pv)


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def quantize(k: Tensor, v: Tensor, blocks: Blocks, qk: str, pv: str) -> Quantized:
    """Return k and v, smoothed and quantised per kv block."""
    k8, k_scale, k_mean, v8, v_exponent, v_mean = _quantize(
        k, v, blocks.kv_offsets, blocks.kv_block_size, qk, pv
    )
    return Quantized(
        k=k8,
        k_scale=k_scale,
        k_mean=k_mean,
        v=v8 if pv == "fp8" else v,
        v_exponent=v_exponent,
        v_mean=v_mean,
        num_tokens=k.shape[2],
    )


def forward(
    q: Tensor, quantized: Quantized, blocks: Blocks, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] in q's dtype and lse [B, H, Sq] in fp32."""
    return _attention(
        q,
        *vars(quantized).values(),
        blocks.kv_num_blocks,
        blocks.kv_indices,
        blocks.q_offsets,
        blocks.kv_offsets,
        blocks.q_block_size,
        blocks.kv_block_size,
        scale,
        backend,
    )
