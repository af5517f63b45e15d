"""Dense attention whose gradients can be trusted on every SDPA backend.

The backward of cuDNN's SDPA reads grad_output as if it had the strides of the output. Where they
differ, say a contiguous grad_output for a transposed output, dq, dk and dv come out wrong, and
nothing says so (torch 2.11 with cuDNN 9.19, where cuDNN is the default on Hopper). So grad_output
is laid out like the output before SDPA sees it; where they agree, as usual, that costs nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Return softmax(scale * q k^T) v, [B, H, Sq, D], by the fastest SDPA backend there is.

    q is [B, H, Sq, D], k and v are [B, H, Sk, D]; scale is 1 / sqrt(D) if left out.
    """
    return _LayOutGradient.apply(F.scaled_dot_product_attention(q, k, v, scale=scale))


class _LayOutGradient(torch.autograd.Function):
    """The identity; its gradient has the strides of its input."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.stride = out.stride()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.stride:
            return grad
        laid_out = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device)
        return laid_out.copy_(grad)
