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


def forward_budget(
    score: Tensor,
    mass: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    k: Tensor,
    sure_k: Tensor,
    p: Tensor,
) -> Tensor:
    """Return bool [B, H, Nq, Nk]."""
    size, num_queries = kv_offsets.diff()[..., None, :], q_offsets.diff()[..., None]
    sure = forward(mass, sure_k, torch.zeros_like(p), True)
    spare = ((forward(mass, k, p, True) & ~sure) * size * (num_queries > 0)).sum(-1, keepdim=True)
    score = score.float().masked_fill(score.isnan(), torch.inf)
    cost = (size * ~sure).expand(score.shape)
    gain = (score / size.clamp(min=1)).masked_fill(cost == 0, -1)
    order = gain.argsort(dim=-1, descending=True, stable=True)
    ordered = cost.gather(-1, order)
    keep = (ordered.cumsum(-1) - ordered < spare) & (ordered > 0)
    return torch.zeros_like(sure).scatter_(-1, order, keep) | sure
