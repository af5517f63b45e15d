"""What each block costs when its mean stands for it: the probe of error-aware routing."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import choose_backend, no_autocast
from ..block_pool.op import block_mean_pair
from ..check import check_offsets, check_scale

KINDS = ("output", "keys")
_TRITON_HEAD_DIMS = (16, 32, 64, 128)


class BlockErrors(NamedTuple):
    """Natural logarithms of what the mean query of each q block says of each kv block.

    -inf stands for 0: an empty block has no mass, and it and a block of equal keys no error.
    """

    log_error: Tensor  # [B, H, Nq, Nk]
    log_mass: Tensor  # [B, H, Nq, Nk], of the share of attention; rows sum to 1


@torch.no_grad()
def block_error(
    q_mean: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    kv_block_size: int,
    *,
    kind: str = "output",
    scale: float | None = None,
    backend: str = "auto",
) -> BlockErrors:
    """Return each kv block's error when one centroid replaces it, and its attention mass.

    With s = scale * q_mean . k, s' = scale * q_mean . mean(k) over the block, and Z the sum of e^s
    over all keys, the error is
        output  |sum of (e^s - e^s') (v - o)|^2 / Z^2, the squared change of the output, with o the
                output of the centroids: comparable across rows, heads and layers
        keys    sum of |e^s v - e^s' mean(v)|^2 (SVG-EAR, arXiv 2603.08982, Eq. 8): comparable
                within a row
    both for one query. Computed in the log domain, so that no logit overflows, and from
    differences, so that small errors keep their order. No gradient, no sync, deterministic.

    Args:
        q_mean: [B, H, Nq, D], floating point; computed with in k's type.
        k: [B, H, S, D] in block order; v has its shape and type.
        kv_offsets: [Nk + 1] or [B, H, Nk + 1], first token of each kv block.
        kv_block_size: tokens of the largest kv block, or more.
        kind: "output" or "keys".
        scale: factor on the product; 1 / sqrt(D) if left out.
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton" (D 16, 32, 64 or
            128).

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    _check(q_mean, k, v, kind)
    check_offsets("kv_offsets", kv_offsets, k, kv_block_size)
    scale = check_scale(scale, k.shape[3])
    backend = choose_backend(backend, k.device, k.dtype)
    match backend:
        case "reference":
            from .reference import forward
        case _:
            if k.shape[3] not in _TRITON_HEAD_DIMS or k.dtype == torch.float64:
                raise ValueError(
                    f"k must be of {_TRITON_HEAD_DIMS} dims and not float64 for backend 'triton', "
                    f"got {k.dtype} of {k.shape[3]}; use backend='reference'"
                )
            from .triton import forward
    q_mean = q_mean.to(k.dtype)
    k_mean, v_mean = block_mean_pair(
        k, v, kv_offsets, kv_offsets, kv_block_size, kv_block_size, backend=backend
    )  # fp32, or fp64
    with no_autocast(q_mean):
        # The same rounded query as meets the keys: one rounded otherwise would shift s' against s.
        logits = q_mean.to(k_mean.dtype) @ k_mean.transpose(-1, -2) * scale  # [B, H, Nq, Nk]
        center = (logits + kv_offsets.diff().log().unsqueeze(-2)).softmax(-1) @ v_mean
        of_output = kind == "output"
        log_error, log_sum = forward(
            q_mean, k, v, logits, v_mean, center, kv_offsets, of_output, scale, kv_block_size
        )
    lse = log_sum.logsumexp(-1, keepdim=True)
    return BlockErrors(log_error - 2 * lse if of_output else log_error, log_sum - lse)


def _check(q_mean: Tensor, k: Tensor, v: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}; use 'output'")
    for name, x in (("q_mean", q_mean), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape or not x.is_floating_point() or x.device != k.device:
            raise ValueError(
                f"{name} must be a non-empty floating-point [B, H, N, D] tensor on {k.device}, got "
                f"{x.dtype} {list(x.shape)} on {x.device}; unflatten the heads or move it"
            )
    shape = (*k.shape[:2], q_mean.shape[2], k.shape[3])
    if k.shape != v.shape or k.dtype != v.dtype or q_mean.shape != shape:
        raise ValueError(
            "k and v must have one shape and type, and q_mean their batch, heads and dims, got "
            f"q_mean {list(q_mean.shape)}, k {k.dtype} {list(k.shape)}, v {v.dtype} "
            f"{list(v.shape)}; expand shared heads first"
        )
