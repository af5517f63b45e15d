"""Block gates: the gradient of attention with respect to selecting a block or not."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import Blocks
from ..check import check_attention


def block_gate(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    column: Tensor,
    blocks: Blocks,
    *,
    centroids: bool,
    column_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention's `out` unchanged; its backward gives `gate` the gate gradient.

    A gate g of a pair of blocks blends it: its tokens get the logit + ln g, and with `centroids`
    its centroid column + ln(1 - g). It is 1 for a selected pair and 0 for another, and the
    gradient is taken there, whatever `gate` holds (a straight-through estimate). No gradient goes
    to q, k and v here: attention's own backward gives it. No [Sq, Sk] is held; deterministic.

    Args:
        out: [B, H, Sq, D], what attention gave for q, k, v and blocks.
        lse: [B, H, Sq], likewise.
        gate: [B, H, Nq, M], of the pairs that `column` names.
        column: int64 [B, H, Nq, M], kv blocks of each q block.
        centroids: whether attention was `compensated_attention`, else `block_sparse_attention`.
        column_gate: [H], the `gate` argument of `compensated_attention`.
        scale: factor on q k^T; 1 / sqrt(D) if left out.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    rows = (*q.shape[:2], blocks.q_offsets.shape[-1] - 1)
    if column.shape[:3] != rows or column.ndim != 4 or column.dtype != torch.int64:
        raise ValueError(
            f"column must be int64 {[*rows, 'M']}, got {column.dtype} {list(column.shape)}; "
            "name M kv blocks for each q block"
        )
    if gate.shape != column.shape or not gate.is_floating_point():
        raise ValueError(
            f"gate must be floating point of column's shape {list(column.shape)}, got {gate.dtype} "
            f"{list(gate.shape)}; give one gate for each pair of blocks"
        )
    if out.shape != q.shape or lse.shape != q.shape[:3]:
        raise ValueError(
            f"out and lse must be {list(q.shape)} and {list(q.shape[:3])}, got {list(out.shape)} "
            f"and {list(lse.shape)}; take both from the attention op"
        )
    detached = (x.detach() for x in (lse, q, k, v))
    extra = None if column_gate is None else column_gate.detach()
    return _BlockGate.apply(out, gate, column, *detached, extra, blocks, centroids, scale)


class _BlockGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        gate: Tensor,
        column: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        column_gate: Tensor | None,
        blocks: Blocks,
        centroids: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(column, lse, q, k, v, out, column_gate)
        ctx.blocks, ctx.centroids, ctx.scale, ctx.dtype = blocks, centroids, scale, gate.dtype
        return out.clone()  # an alias of its input is what torch.compile has been wrong about

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from .reference import gate_gradient

        column, lse, q, k, v, out, column_gate = ctx.saved_tensors
        found = None
        if ctx.needs_input_grad[1]:
            found = gate_gradient(
                q, k, v, grad, out, lse, column, ctx.blocks, ctx.centroids, column_gate, ctx.scale
            ).to(ctx.dtype)
        return grad, found, *[None] * 9
