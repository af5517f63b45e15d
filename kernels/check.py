"""Checks of the tensors that the attention ops share: each failure names field, value and fix."""

import math

import torch
from torch import Tensor

from .blocks import Blocks


def check_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float | None) -> float:
    """Raise ValueError unless q, k, v and blocks belong together; return the scale to use."""
    _check_qkv(q, k, v)
    _check_blocks(blocks, q, k)
    return check_scale(scale, q.shape[-1])


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the scale to use, 1 / sqrt(head dim) for None; ValueError unless finite and > 0."""
    if scale is None:
        return head_dim**-0.5
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"scale must be finite and > 0, got {scale}; leave it out for 1 / sqrt(head dim)"
        )
    return float(scale)


def check_offsets(name: str, offsets: Tensor, x: Tensor, block_size: int) -> None:
    """Raise ValueError unless offsets cut x [B, H, S, D] into blocks of at most block_size.

    They are [N + 1], or [B, H, N + 1] where each head has its own. The values are looked at on the
    CPU only; on another device that would wait for it.
    """
    is_shaped = offsets.ndim > 0 and offsets.shape[:-1] in ((), x.shape[:2])
    is_index = offsets.dtype in (torch.int32, torch.int64)
    if not is_shaped or offsets.shape[-1] < 2 or not is_index:
        raise ValueError(
            f"{name} must be int32 or int64 [N + 1] or {[*x.shape[:2], 'N + 1']} with N >= 1, "
            f"got {offsets.dtype} {list(offsets.shape)}; take it from a block layout"
        )
    if offsets.device != x.device:
        raise ValueError(
            f"{name} must be on the tensors' device {x.device}, got {offsets.device}; move it there"
        )
    if block_size < 1:
        raise ValueError(
            f"block_size of {name} must be >= 1, got {block_size}; pass the largest block's tokens"
        )
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last, sizes = offsets[..., 0], offsets[..., -1], offsets.diff()
    ends_fit = bool((first == 0).all() and (last == x.shape[2]).all())
    if not ends_fit or sizes.min() < 0 or sizes.max() > block_size:
        raise ValueError(
            f"{name} must rise from 0 to the {x.shape[2]} tokens in steps of at most block_size "
            f"{block_size}, got {int(first.max())} to {int(last.min())} in steps of "
            f"{int(sizes.min())} to {int(sizes.max())}; build offsets and block size from the same "
            "layout"
        )


def check_shared_offsets(blocks: Blocks) -> None:
    """Raise ValueError if each head has blocks of its own."""
    if blocks.q_offsets.ndim != 1 or blocks.kv_offsets.ndim != 1:
        raise ValueError(
            "blocks.q_offsets and blocks.kv_offsets must be [N + 1], got offsets for each head; "
            "use a layout whose blocks are alike for all heads, or block_sparse_attention"
        )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be a non-empty [B, H, S, D] tensor, got shape {list(x.shape)}; "
                "transpose or unflatten it first"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device, {q.dtype} on {q.device}, got {x.dtype} on "
                f"{x.device}; convert it with .to(q)"
            )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k and v must have one shape and q's batch, heads and head dim, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expand shared heads first"
        )
    if not q.is_floating_point():
        raise ValueError(
            f"q must be floating point, got {q.dtype}; convert it to float32 or bfloat16"
        )


def _check_blocks(blocks: Blocks, q: Tensor, k: Tensor) -> None:
    check_offsets("blocks.q_offsets", blocks.q_offsets, q, blocks.q_block_size)
    check_offsets("blocks.kv_offsets", blocks.kv_offsets, k, blocks.kv_block_size)
    rows, columns = blocks.q_offsets.shape[-1] - 1, blocks.kv_offsets.shape[-1] - 1
    expected = {
        "kv_num_blocks": (*q.shape[:2], rows),
        "kv_indices": (*q.shape[:2], rows, columns),
        "q_num_blocks": (*q.shape[:2], columns),
        "q_indices": (*q.shape[:2], columns, rows),
    }
    for name, shape in expected.items():
        x = getattr(blocks, name)
        if x.shape != shape or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"blocks.{name} must be int32 {list(shape)} on {q.device}, got {x.dtype} "
                f"{list(x.shape)} on {x.device}; build it with Blocks.from_selected"
            )
