"""Block-sparse attention in INT8 or FP8, for inference: no gradient flows through it."""

import torch
from torch import Tensor

from ..block_sparse_attention.op import backend_for
from ..blocks import Blocks
from ..check import check_attention, check_offsets, check_scale, check_shared_offsets
from ..quantized import Quantized

BACKENDS = ("reference", "triton", "hopper")
_HEAD_DIMS = (64, 128)
_TRITON_MAX_BLOCK = 128
_DTYPES = (torch.float16, torch.bfloat16)


def quantized_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    scale: float | None = None,
    qk: str = "int8",
    pv: str = "fp8",
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] in q's dtype and lse [B, H, Sq], fp32, a natural logarithm.

    Both are those of block_sparse_attention but for rounding: the lse includes what smoothing took
    from the logits, so the parts of a merge may mix both ops. A query whose block selects nothing
    has out 0 and lse -inf. Where k and v serve several calls, use `quantize` and
    `attend_quantized`.

    Args:
        q: [B, H, Sq, D], float16 or bfloat16.
        k: [B, H, Sk, D], of q's dtype and device; v has its shape.
        blocks: the selected kv blocks of each q block; on a GPU its offsets are taken on trust.
        scale: factor on q k^T; 1 / sqrt(D) if left out.
        qk: "int8" or "fp8" (e4m3), how queries and keys are rounded; int8 is 3 times as exact.
        pv: "fp8", or "none" to leave the values and their weights in 16 bits.
        backend: as in `block_sparse_attention`, with head dim 64 or 128 for "triton" and pv "fp8"
            for "hopper".

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    _check_inputs(q, k, v)
    return attend_quantized(
        q,
        quantize(k, v, blocks, qk=qk, pv=pv, backend=backend),
        blocks,
        scale=scale,
        backend=backend,
    )


def quantize(
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    qk: str = "int8",
    pv: str = "fp8",
    backend: str = "reference",
) -> Quantized:
    """Return k and v [B, H, Sk, D] as `attend_quantized` takes them, whatever the queries are.

    The arguments and errors are those of quantized_block_sparse_attention.
    """
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            "k and v must be [B, H, S, D] of one shape, dtype and device, got "
            f"{k.dtype} {list(k.shape)} on {k.device} and {v.dtype} {list(v.shape)} on {v.device}; "
            "convert v with .to(k)"
        )
    if qk not in ("int8", "fp8"):
        raise ValueError(f"qk must be 'int8' or 'fp8', got {qk!r}; use 'int8'")
    if pv not in ("fp8", "none"):
        raise ValueError(f"pv must be 'fp8' or 'none', got {pv!r}; use 'fp8'")
    check_offsets("blocks.kv_offsets", blocks.kv_offsets, k, blocks.kv_block_size)
    _check_inputs(k, v)
    backend = _choose_backend(backend, k, blocks, pv)
    match backend:
        case "reference":
            from . import reference

            return reference.quantize(k, v, blocks, qk, pv)
        case _:
            from . import operator

            return operator.quantize(k, v, blocks, qk, pv)


def attend_quantized(
    q: Tensor,
    quantized: Quantized,
    blocks: Blocks,
    *,
    scale: float | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return out and lse of quantized_block_sparse_attention for keys and values made ready.

    `quantized` must come from `quantize` with the same kv blocks; the selection may differ.
    """
    scale = check_scale(scale, q.shape[-1])
    _check_inputs(q)
    check_offsets("blocks.q_offsets", blocks.q_offsets, q, blocks.q_block_size)
    pv = "fp8" if quantized.v.dtype == torch.float8_e4m3fn else "none"
    backend = _choose_backend(backend, q, blocks, pv)
    expected = (*q.shape[:2], blocks.kv_offsets.numel() - 1)
    found, num_slots = quantized.k.shape, quantized.k.shape[3]
    if (*found[:3], found[4]) != (*expected, q.shape[3]) or num_slots < blocks.kv_block_size:
        raise ValueError(
            f"quantized must hold {list(expected)} blocks of at least {blocks.kv_block_size} slots "
            f"and head dim {q.shape[3]}, got {list(found)}; quantize k and v with the same blocks"
        )
    if quantized.k.device != q.device:
        raise ValueError(
            f"quantized must be on q's device {q.device}, got {quantized.k.device}; quantize there"
        )
    match backend:
        case "reference":
            from . import reference

            return reference.forward(q, quantized, blocks, scale)
        case _:
            from . import operator

            return operator.forward(q, quantized, blocks, scale, backend)


def _check_inputs(*tensors: Tensor) -> None:
    if tensors[0].dtype not in _DTYPES:
        raise ValueError(
            f"dtype must be float16 or bfloat16, got {tensors[0].dtype}; convert q, k and v or use "
            "block_sparse_attention"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "quantized attention has no gradient, but an input requires one; call it under "
            "torch.no_grad() or use block_sparse_attention"
        )


def _choose_backend(backend: str, x: Tensor, blocks: Blocks, pv: str) -> str:
    check_shared_offsets(blocks)
    chosen = backend_for(backend, x, blocks)
    if chosen == "triton" and x.shape[-1] not in _HEAD_DIMS:
        raise ValueError(
            f"head dim must be one of {_HEAD_DIMS} for backend 'triton', got {x.shape[-1]}; "
            "use backend='reference'"
        )
    size = max(blocks.q_block_size, blocks.kv_block_size)
    if chosen == "triton" and size > _TRITON_MAX_BLOCK:
        raise ValueError(
            f"block size must be at most {_TRITON_MAX_BLOCK} tokens for backend 'triton', got "
            f"{size}; use smaller blocks or backend='reference'"
        )
    if chosen == "hopper" and pv == "none":
        if backend == "auto":
            return "triton"
        raise ValueError(
            "pv must be 'fp8' for backend 'hopper', got 'none'; use backend='triton' or 'auto'"
        )
    return chosen
