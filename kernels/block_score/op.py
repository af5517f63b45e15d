"""Attention between block means: how much each kv block is worth to each q block."""

import torch
from torch import Tensor

from ..backend import choose_backend
from ..check import check_scale

_MAX_HEAD_DIM = 256


@torch.no_grad()
def block_score(
    q_mean: Tensor,
    k_mean: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return softmax over kv blocks of scale * q_mean . (k_mean - its mean) + ln n, [B, H, Nq, Nk].

    n is the number of tokens of the kv block; an empty block scores 0. Each row sums to 1. The
    estimator of SpargeAttention (arXiv 2502.18137, section 3). No gradient, no sync, deterministic.

    Args:
        q_mean: [B, H, Nq, D], fp32.
        k_mean: [B, H, Nk, D], fp32.
        kv_offsets: [Nk + 1] or [B, H, Nk + 1], first token of each kv block.
        scale: factor on the product; 1 / sqrt(D) if left out.
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton" (D up to 256).

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    for name, x in (("q_mean", q_mean), ("k_mean", k_mean)):
        if x.ndim != 4 or x.dtype != torch.float32:
            raise ValueError(
                f"{name} must be a float32 [B, H, N, D] tensor, got {x.dtype} {list(x.shape)}; "
                "take it from block_mean"
            )
    if q_mean.shape[:2] != k_mean.shape[:2] or q_mean.shape[3] != k_mean.shape[3]:
        raise ValueError(
            f"q_mean and k_mean must share B, H and D, got {list(q_mean.shape)} and "
            f"{list(k_mean.shape)}; expand shared heads first"
        )
    shapes = ((k_mean.shape[2] + 1,), (*k_mean.shape[:2], k_mean.shape[2] + 1))
    if kv_offsets.shape not in shapes or kv_offsets.device != k_mean.device:
        raise ValueError(
            f"kv_offsets must be {list(shapes[0])} or {list(shapes[1])} on {k_mean.device}, got "
            f"{list(kv_offsets.shape)} on {kv_offsets.device}; take both from one block layout"
        )
    scale = check_scale(scale, q_mean.shape[3])
    match choose_backend(backend, q_mean.device, q_mean.dtype):
        case "reference":
            from .reference import forward
        case "triton":
            if q_mean.shape[3] > _MAX_HEAD_DIM:
                raise ValueError(
                    f"head dim must be at most {_MAX_HEAD_DIM} for backend 'triton', got "
                    f"{q_mean.shape[3]}; use backend='reference'"
                )
            from .triton import forward
    return forward(q_mean, k_mean, kv_offsets, scale)
