"""The compiled backends as one PyTorch operator: fakes for torch.compile, and autograd."""

from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import unit_inner_stride
from ..blocks import Blocks


def kernels_of(backend: str) -> ModuleType:
    """Return the module with `forward` and `backward` of a backend, loaded when first used."""
    match backend:
        case "hopper":
            from . import hopper

            return hopper
        case _:
            from . import triton

            return triton


def record(*values: Any) -> Blocks:
    return Blocks(**dict(zip((f.name for f in fields(Blocks)), values, strict=True)))


@torch.library.custom_op("gossamer::block_sparse_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor,
    q_indices: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    q_block_size: int,
    kv_block_size: int,
    is_uniform: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    blocks = record(
        kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_offsets, kv_offsets,
        q_block_size, kv_block_size, is_uniform,
    )  # fmt: skip
    return kernels_of(backend).forward(q, k, v, blocks, scale)


@torch.library.custom_op("gossamer::block_sparse_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor,
    q_indices: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    q_block_size: int,
    kv_block_size: int,
    is_uniform: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = record(
        kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_offsets, kv_offsets,
        q_block_size, kv_block_size, is_uniform,
    )  # fmt: skip
    grads = (unit_inner_stride(grad_out), grad_lse.contiguous())
    return kernels_of(backend).backward(*grads, q, k, v, out, lse, blocks, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.q_block_size, ctx.kv_block_size, ctx.is_uniform, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    rest = (ctx.q_block_size, ctx.kv_block_size, ctx.is_uniform, ctx.scale, ctx.backend)
    dq, dk, dv = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *rest)
    return dq, dk, dv, *(None,) * 11


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    q, k, v = (unit_inner_stride(x) for x in (q, k, v))
    return _attention(
        q, k, v, blocks.kv_num_blocks, blocks.kv_indices, blocks.q_num_blocks, blocks.q_indices,
        blocks.q_offsets, blocks.kv_offsets, blocks.q_block_size, blocks.kv_block_size,
        blocks.is_uniform, scale, backend,
    )  # fmt: skip
