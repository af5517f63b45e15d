"""The compiled backends as one PyTorch operator: exact kernels, then those of the centroids."""

from typing import Any

import torch
from torch import Tensor

from ..backend import unit_inner_stride
from ..block_pool.op import block_mean_pair
from ..block_sparse_attention.operator import kernels_of, record
from ..blocks import Blocks


@torch.library.custom_op("gossamer::compensated_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    bias: Tensor | None,
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
    from . import triton

    blocks = record(
        kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_offsets, kv_offsets,
        q_block_size, kv_block_size, is_uniform,
    )  # fmt: skip
    exact = kernels_of(backend)
    if backend == "hopper":  # its forward takes the centroids along
        columns = triton.column_logits(blocks, bias)
        centroids = exact.Centroids(k_mean, v_mean, columns)
        return exact.forward(q, k, v, blocks, scale, centroids)
    out, lse = exact.forward(q, k, v, blocks, scale)
    triton.add_centroids(q, k_mean, v_mean, bias, out, lse, blocks, scale)
    return out, lse


@torch.library.custom_op("gossamer::compensated_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    bias: Tensor | None,
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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton

    blocks = record(
        kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_offsets, kv_offsets,
        q_block_size, kv_block_size, is_uniform,
    )  # fmt: skip
    grads = (unit_inner_stride(grad_out), grad_lse.contiguous())
    exact = kernels_of(backend)
    if backend == "hopper" and not bias_grad:  # its backward takes the centroids along
        terms = exact.row_terms(*grads, out, lse)
        columns = triton.column_logits(blocks, bias)
        parts = triton.centroid_gradients(
            grads[0], q, k_mean, v_mean, columns, lse, terms.delta, blocks, scale
        )
        centroids = (exact.Centroids(k_mean, v_mean, columns), exact.CentroidGradients(*parts))
        dq, dk, dv = exact.backward(*grads, q, k, v, out, lse, blocks, scale, terms, centroids)
        return dq, dk, dv, lse.new_empty(0)
    dq, dk, dv = exact.backward(*grads, q, k, v, out, lse, blocks, scale)
    dbias = triton.add_centroid_gradients(
        *grads, q, k_mean, v_mean, bias, out, lse, dq, dk, dv, blocks, scale, bias_grad
    )
    return dq, dk, dv, lse.new_empty(0) if dbias is None else dbias


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = grad_lse.new_empty(rest[6].shape if rest[-1] else 0)  # rest[6]: kv_indices
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.q_block_size, ctx.kv_block_size, ctx.is_uniform, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:6], *output, *tensors[6:])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    bias_grad = ctx.needs_input_grad[5]
    rest = (ctx.q_block_size, ctx.kv_block_size, ctx.is_uniform, ctx.scale, ctx.backend, bias_grad)
    dq, dk, dv, dbias = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *rest)
    return dq, dk, dv, None, None, dbias if bias_grad else None, *(None,) * 11


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    q, k, v = (unit_inner_stride(x) for x in (q, k, v))
    # The means enter without a graph: the operator's dk and dv hold the gradient through them.
    means = block_mean_pair(
        k.detach(), v.detach(), *(blocks.kv_offsets,) * 2, *(blocks.kv_block_size,) * 2
    )
    k_mean, v_mean = (x.to(q.dtype) for x in means)
    return _attention(
        q, k, v, k_mean, v_mean, bias,
        blocks.kv_num_blocks, blocks.kv_indices, blocks.q_num_blocks, blocks.q_indices,
        blocks.q_offsets, blocks.kv_offsets, blocks.q_block_size, blocks.kv_block_size,
        blocks.is_uniform, scale, backend,
    )  # fmt: skip
