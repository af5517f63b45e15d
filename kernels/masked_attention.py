"""Dense attention with a bias per block pair, in plain PyTorch: the core of the references.

S = scale * q k^T + bias, P = softmax of S over the keys, out = P v, and the lse of S. A bias of
-inf hides the block. Logits and softmax are fp32 (fp64 for fp64 inputs) whatever the input type is
and whatever autocast says. The backward recomputes P; with g and h the gradients of out and lse,
    dS = P * (g v^T - rowsum(g * out) + h),
and dbias sums dS over the tokens of each pair of blocks.
Batch entries and heads are taken a few at a time, so that their S stays in the processor's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import no_autocast

# Logits held at once: one head of 1,024 tokens on a CPU, 1 GiB of fp32 elsewhere.
_MAX_LOGITS_CPU = 1 << 20
_MAX_LOGITS = 1 << 28


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, row: Tensor, column: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out (q's dtype, [B, H, Sq, D]) and lse (fp32, or fp64 for fp64, [B, H, Sq]).

    A query that sees no key has out 0, lse -inf and gradient 0.

    Args:
        bias: [B, H, R, C] added to the logits of each block pair; differentiable as well.
        row: int64 [Sq] or [B, H, Sq], the row of `bias` that holds each query.
        column: int64 [Sk] or [B, H, Sk], the column of `bias` that holds each key.
    """
    row, column = (x.expand(*q.shape[:2], x.shape[-1]) for x in (row, column))
    return _MaskedAttention.apply(q, k, v, bias, row, column, scale)


def _heads_at_once(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (batch entry, heads) pieces that cover [B, H]."""
    limit = _MAX_LOGITS_CPU if q.device.type == "cpu" else _MAX_LOGITS
    step = max(1, limit // max(1, q.shape[2] * k.shape[2]))
    for entry in range(q.shape[0]):
        for head in range(0, q.shape[1], step):
            yield entry, slice(head, head + step)


def _logits(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    # Raw operands: the scale is applied to the finished dot product. bias [h, Sq, Sk] is consumed.
    return bias.baddbmm_(q, k.transpose(1, 2), alpha=scale)


def _along(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """Repeat index along one dimension of x, for gather."""
    shape = [-1] * x.ndim
    shape[dim] = x.shape[dim]
    return index.unsqueeze(dim).expand(shape)


def _by_token(bias: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return bias [h, R, C] for each query and key, [h, Sq, Sk]; row [h, Sq], column [h, Sk]."""
    by_key = bias.gather(2, _along(column, bias, 1))  # [h, R, Sk]
    return by_key.gather(1, _along(row, by_key, 2))


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        row: Tensor,
        column: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # Rows that see no key go through the softmax with a bias of 0 and are overwritten after it.
        hidden = bias == float("-inf")
        blind = hidden.gather(3, _along(column, hidden, 2)).all(-1)  # [B, H, R]
        bias = bias.to(dtype).masked_fill(blind[..., None], 0)
        blind = blind.gather(2, row)  # [B, H, Sq]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        with no_autocast(q):
            for at in _heads_at_once(q, k):
                q_, k_, v_ = (x[at].to(dtype) for x in (q, k, v))  # [h, S, D]
                logits = _logits(
                    q_, k_, _by_token(bias[at], row[at], column[at]), scale
                )  # [h, Sq, Sk]
                prob = logits.softmax(-1)
                lse[at] = logits.amax(-1) - prob.amax(-1).log()
                out[at] = torch.bmm(prob, v_)
        # Not in place: under torch.compile of torch 2.11 an output that aliases a tensor made here
        # (a write in place, a `to` that changes nothing) gets gradient 0.
        out = out.masked_fill(blind[..., None], 0)
        lse = lse.masked_fill(blind, float("-inf"))
        ctx.save_for_backward(q, k, v, bias, row, column, out, blind)
        ctx.scale = scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, row, column, out, blind = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = torch.empty_like(bias)
        grad_out = grad_out.to(bias.dtype).masked_fill(blind[..., None], 0)
        delta = (grad_out * out).sum(-1).sub_(grad_lse).masked_fill_(blind, 0)  # [B, H, Sq]
        with no_autocast(q):
            for at in _heads_at_once(q, k):
                q_, k_, v_ = (x[at].to(bias.dtype) for x in (q, k, v))
                logits = _logits(q_, k_, _by_token(bias[at], row[at], column[at]), ctx.scale)
                prob = logits.softmax(-1)
                dv[at] = torch.bmm(prob.transpose(1, 2), grad_out[at])
                grad = torch.bmm(grad_out[at], v_.transpose(1, 2))
                grad.sub_(delta[at].unsqueeze(-1)).mul_(prob)
                dq[at] = torch.bmm(grad, k_).mul_(ctx.scale)
                dk[at] = torch.bmm(grad.transpose(1, 2), q_).mul_(ctx.scale)
                if dbias is not None:
                    in_row, in_column = (
                        (x[at][:, None] == torch.arange(n, device=x.device)[:, None]).to(grad.dtype)
                        for x, n in zip((row, column), bias.shape[2:], strict=True)
                    )  # [h, n, S]
                    dbias[at] = in_row @ grad @ in_column.transpose(1, 2)
        return dq, dk, dv, dbias, None, None, None
