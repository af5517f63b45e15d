"""Selection of kv blocks by their scores within a budget."""

import torch
from torch import Tensor

from ..backend import choose_backend

_MAX_COLUMNS = 16384


@torch.no_grad()
def hybrid_select(
    score: Tensor, k: Tensor, p: Tensor, *, keep_crossing: bool = True, backend: str = "auto"
) -> Tensor:
    """Return bool [B, H, Nq, Nk]: per row the union of Top-k and Top-p (SpargeAttention2, Eq. 9).

    Both are prefixes of the row in descending order, ties to the lower block. Top-k holds the share
    k of the Nk blocks, rounded and at least 1; Top-p ends with the block at which the mass reaches
    p, or before a block that would take it above p where keep_crossing is False (SpargeAttention),
    and p >= 1 keeps all. A NaN counts as infinite, and an infinite score leaves its row to k
    alone (and to p >= 1). No gradient, no sync, deterministic.

    Args:
        score: [B, H, Nq, Nk], floating point, >= 0; computed with in fp32.
        k: [H] or [1], fp32, shares from 0 to 1.
        p: [H] or [1], fp32, masses from 0 to 1.
        keep_crossing: whether the block that crosses p is kept.
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton" (Nk up to 16,384).

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    _check(score, k, p)
    match _backend(backend, score):
        case "reference":
            from .reference import forward
        case _:
            from .triton import forward
    return forward(score, k, p, keep_crossing)


@torch.no_grad()
def budget_select(
    score: Tensor,
    mass: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    k: Tensor,
    p: Tensor,
    *,
    guaranteed: float,
    backend: str = "auto",
) -> Tensor:
    """Return bool [B, H, Nq, Nk]: the tokens of a row's Hybrid set spent on blocks of most score.

    Of the blocks in order of mass, the share k * guaranteed (rounded, at least one block) stays.
    The other tokens of the row's Hybrid set of (k, p) by mass go to blocks by score over tokens,
    until they are spent: at most one block beyond. Ties go to the lower block, a NaN counts as
    infinite. A row without queries gets the sure blocks alone. No gradient, no sync, deterministic.

    Args:
        score: [B, H, Nq, Nk], floating point, >= 0; mass as well. Both are computed with in fp32.
        q_offsets: [Nq + 1] or [B, H, Nq + 1], first token of each q block; kv_offsets alike.
        k: [H] or [1], fp32, shares from 0 to 1; p as well.
        guaranteed: share of k from 0 to 1.
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton" (Nk up to 16,384).

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    _check(score, k, p)
    if mass.shape != score.shape or not mass.is_floating_point() or mass.device != score.device:
        raise ValueError(
            f"mass must be floating-point {list(score.shape)} on {score.device} as score is, got "
            f"{mass.dtype} {list(mass.shape)} on {mass.device}; take both from one estimator"
        )
    for name, x, n in (("q_offsets", q_offsets, 2), ("kv_offsets", kv_offsets, 3)):
        last = score.shape[n] + 1
        if x.shape not in ((last,), (*score.shape[:2], last)) or x.device != score.device:
            raise ValueError(
                f"{name} must be [{last}] or [B, H, {last}] on {score.device}, got "
                f"{list(x.shape)} on {x.device}; take it from the layout of the scores"
            )
    if not 0 <= guaranteed <= 1:
        raise ValueError(f"guaranteed must be a share from 0 to 1, got {guaranteed}; pass e.g. 0.5")
    match _backend(backend, score):
        case "reference":
            from .reference import forward_budget
        case _:
            from .triton import forward_budget
    return forward_budget(score, mass, q_offsets, kv_offsets, k, k * guaranteed, p)


def _check(score: Tensor, k: Tensor, p: Tensor) -> None:
    if score.ndim != 4 or not score.is_floating_point():
        raise ValueError(
            f"score must be a floating-point [B, H, Nq, Nk] tensor, got {score.dtype} "
            f"{list(score.shape)}; take it from block_score"
        )
    for name, x in (("k", k), ("p", p)):
        if x.ndim != 1 or x.numel() not in (1, score.shape[1]) or x.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 of shape [1] or [{score.shape[1]}], one share a head, got "
                f"{x.dtype} {list(x.shape)}; pass e.g. torch.full(({score.shape[1]},), 0.1)"
            )
        if x.device != score.device:
            raise ValueError(
                f"{name} must be on score's device {score.device}, got {x.device}; move it there"
            )


def _backend(backend: str, score: Tensor) -> str:
    chosen = choose_backend(backend, score.device, score.dtype)
    if chosen == "triton" and score.shape[3] > _MAX_COLUMNS:
        raise ValueError(
            f"Nk must be at most {_MAX_COLUMNS} for backend 'triton', got "
            f"{score.shape[3]}; use larger blocks or backend='reference'"
        )
    return chosen
