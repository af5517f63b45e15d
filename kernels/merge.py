"""Merge two attentions over disjoint keys into the attention over all of them.

lse = logaddexp(lse_a, lse_b), out = w_a out_a + w_b out_b with w = exp(lse_part - lse). With g the
gradient of out and h that of lse,
    d out_a = w_a g        d lse_a = w_a (g . (out_a - out) + h).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [B, H, S, D] in out_a's dtype and its lse [B, H, S], in fp32 (or fp64) throughout.

    A part with lse -inf is empty and takes no share; where both are empty out is 0, lse -inf and
    every gradient 0. An lse is a natural logarithm.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            "out_a and out_b must have one shape [B, H, S, D], lse_a and lse_b be [B, H, S], got "
            f"{[list(x.shape) for x in (out_a, lse_a, out_b, lse_b)]}; merge the same queries"
        )
    if lse_a.dtype != lse_b.dtype or lse_a.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"lse_a and lse_b must both be float32 or both float64, got {lse_a.dtype} and "
            f"{lse_b.dtype}; do not round an lse"
        )
    return _Merge.apply(out_a, lse_a, out_b, lse_b)


def _weights(lse_a: Tensor, lse_b: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    lse = lse.masked_fill(lse == float("-inf"), 0)  # both empty: exp(-inf - 0) = 0
    return (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        weight_a, weight_b = _weights(lse_a, lse_b, lse)  # [B, H, S, 1]
        out = out_a * weight_a + out_b * weight_b
        # Under torch.compile of torch 2.11 an output that aliases a tensor made here (a write in
        # place, a `to` that changes nothing) gets gradient 0.
        if out.dtype != out_a.dtype:
            out = out.to(out_a.dtype)
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        weight_a, weight_b = _weights(lse_a, lse_b, lse)
        wide = grad_out.to(lse.dtype)
        rest = grad_lse - (wide * out).sum(-1)  # [B, H, S]
        grads = []
        for part, weight in ((out_a, weight_a), (out_b, weight_b)):
            grads.append((wide * weight).to(part.dtype))
            grads.append(((wide * part).sum(-1) + rest) * weight.squeeze(-1))
        return tuple(grads)
