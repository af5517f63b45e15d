"""Hybrid selection in plain PyTorch, by a sort: it defines what the kernel must compute."""

import torch
from torch import Tensor


def forward(score: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Return bool [B, H, Nq, Nk]."""
    num_blocks = score.shape[-1]
    score = score.float().masked_fill(score.isnan(), torch.inf)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)  # [B, H, Nq, Nk]
    mass_before = ordered.cumsum(-1) - ordered
    k, p = k[:, None, None], p[:, None, None]
    top_k = (k * num_blocks).round().clamp(1, num_blocks)
    top_p = torch.where(p >= 1, num_blocks, (mass_before < p).sum(-1, keepdim=True))
    rank = torch.arange(num_blocks, device=score.device)
    keep = rank < torch.maximum(top_k, top_p)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
