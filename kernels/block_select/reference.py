"""Hybrid selection in plain PyTorch, by a sort: it defines what the kernel must compute."""

import torch
from torch import Tensor


def forward(score: Tensor, k: Tensor, p: Tensor, keep_crossing: bool) -> Tensor:
    """Return bool [B, H, Nq, Nk]."""
    num_blocks = score.shape[-1]
    score = score.float().masked_fill(score.isnan(), torch.inf)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)  # [B, H, Nq, Nk]
    mass = ordered.cumsum(-1)
    k, p = k[:, None, None], p[:, None, None]
    top_k = (k * num_blocks).round().clamp(1, num_blocks)
    in_top_p = mass - ordered < p
    if not keep_crossing:
        in_top_p &= mass <= p
    top_p = torch.where(p >= 1, num_blocks, in_top_p.sum(-1, keepdim=True))
    rank = torch.arange(num_blocks, device=score.device)
    keep = rank < torch.maximum(top_k, top_p)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
