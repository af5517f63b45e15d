"""Permutation of tokens in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(tensors: Sequence[Tensor], orders: Sequence[Tensor], inverse: bool) -> list[Tensor]:
    """Return each tensor [B, H, S, D] in its order, or brought back from it; differentiable."""
    used = [_inverse(order) if inverse else order.long() for order in orders]
    return [
        x.index_select(2, order) if order.ndim == 1 else x.gather(2, order[..., None].expand_as(x))
        for x, order in zip(tensors, used, strict=True)
    ]


def _inverse(order: Tensor) -> Tensor:
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(position).scatter_(-1, order.long(), position)
