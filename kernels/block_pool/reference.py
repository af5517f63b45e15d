"""Mean of each block in plain PyTorch: a padded gather, or running sums for long blocks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import block_of_token


def forward(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return [B, H, N, D] in fp32, or fp64 for fp64 inputs."""
    return _BlockMean.apply(x, offsets, block_size)


def forward_pair(
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_block_size: int,
    y_block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the means of x and of y."""
    return forward(x, x_offsets, x_block_size), forward(y, y_offsets, y_block_size)


# Rows of the padded gather for each token, at most: clusters give a loose bound of their size.
_MAX_PADDING = 4


class _BlockMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_tokens, ctx.dtype = x.shape[2], x.dtype
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        num_blocks = offsets.shape[-1] - 1
        if x.shape[2] == num_blocks * block_size:  # then every block is full
            return x.unflatten(2, (num_blocks, block_size)).mean(3, dtype=dtype)
        if num_blocks * block_size > _MAX_PADDING * x.shape[2]:
            running = torch.nn.functional.pad(x.double().cumsum(2), (0, 0, 1, 0))
            total = _take(running, offsets[..., 1:]) - _take(running, offsets[..., :-1])
            return (total / _sizes(offsets)).to(dtype)
        token = offsets[..., :-1, None] + torch.arange(block_size, device=x.device)
        past = (token >= offsets[..., 1:, None])[..., None]  # [..., N, block_size, 1]
        padded = _take(x, token.clamp(max=x.shape[2] - 1).flatten(-2)).to(dtype)
        padded = padded.unflatten(2, (num_blocks, block_size))  # [B, H, N, block_size, D]
        # Not in place: see masked_attention.py on torch.compile of torch 2.11.
        return padded.masked_fill_(past, 0).sum(3) / _sizes(offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        share = (grad / _sizes(offsets)).to(ctx.dtype)
        return _take(share, block_of_token(offsets, ctx.num_tokens)), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of x [B, H, S, D] by index [n] or [B, H, n]."""
    if index.ndim == 1:
        return x[:, :, index]
    return x.gather(2, index.long()[..., None].expand(-1, -1, -1, x.shape[3]))


def _sizes(offsets: Tensor) -> Tensor:
    return offsets.diff().clamp(min=1)[..., None]
