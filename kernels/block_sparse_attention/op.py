"""Block-sparse attention: exact attention of each q block to the kv blocks selected for it."""

import torch
from torch import Tensor

from ..blocks import Blocks
from ..check import check_attention

_TRITON_HEAD_DIMS = (16, 32, 64, 128)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_BLOCK = 128


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    scale: float | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq], both differentiable in q, k and v.

    The lse is a natural logarithm in fp32 (fp64 for fp64 inputs). A query whose block selects
    nothing has out 0, lse -inf and gradient 0; a key that no block selects has gradient 0.

    Args:
        q: [B, H, Sq, D].
        k: [B, H, Sk, D], of q's dtype and device; v has its shape.
        blocks: the selected kv blocks of each q block; on a GPU its offsets are taken on trust.
        scale: factor on q k^T; 1 / sqrt(D) if left out.
        backend: "reference" (plain PyTorch, any device) or "triton"; see `check_support`.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    check_support(
        backend,
        head_dim=q.shape[-1],
        dtype=q.dtype,
        device=q.device,
        q_block_size=blocks.q_block_size,
        kv_block_size=blocks.kv_block_size,
    )
    match backend:
        case "reference":
            from .reference import forward
        case "triton":
            from .triton import forward
    return forward(q, k, v, blocks, scale)


def check_support(
    backend: str,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    q_block_size: int,
    kv_block_size: int,
) -> None:
    """Raise ValueError if the backend cannot run such inputs; needs no tensor, loads no kernel."""
    if backend not in ("reference", "triton"):
        raise ValueError(
            f"backend must be 'reference' or 'triton', got {backend!r}; "
            "use 'reference' on a CPU and 'triton' on a GPU"
        )
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype must be float32, float16, bfloat16 or float64 ('reference' only), got {dtype}; "
            "convert q, k and v"
        )
    if backend == "triton":
        _check_triton_shapes(head_dim, dtype, q_block_size, kv_block_size)
        _check_triton_device(torch.device(device), dtype)


def _check_triton_shapes(
    head_dim: int, dtype: torch.dtype, q_block_size: int, kv_block_size: int
) -> None:
    if head_dim not in _TRITON_HEAD_DIMS:
        raise ValueError(
            f"head dim must be one of {_TRITON_HEAD_DIMS} for backend 'triton', got {head_dim}; "
            "use backend='reference'"
        )
    if dtype not in _TRITON_DTYPES:
        raise ValueError(
            f"dtype must be float32, float16 or bfloat16 for backend 'triton', got {dtype}; "
            "convert q, k and v or use backend='reference'"
        )
    for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size)):
        if not 1 <= size <= _TRITON_MAX_BLOCK:
            raise ValueError(
                f"{name} must be 1 to {_TRITON_MAX_BLOCK} tokens for backend 'triton', got {size}; "
                "use smaller blocks or backend='reference'"
            )


# torch.compile runs it once, while tracing: it reads Triton's settings, which cannot be traced.
@torch.compiler.assume_constant_result
def _check_triton_device(device: torch.device, dtype: torch.dtype) -> None:
    try:
        import triton
    except ImportError:
        raise ValueError(
            "backend 'triton' needs the package triton, which is not installed; "
            "pip install 'triton>=3.6,<3.8' or use backend='reference'"
        ) from None
    if triton.knobs.runtime.interpret:
        if dtype == torch.bfloat16:
            raise ValueError(
                "dtype must be float32 or float16 under TRITON_INTERPRET=1, got torch.bfloat16, "
                "whose arithmetic the interpreter gets wrong; convert q, k and v or use a GPU"
            )
    elif device.type != "cuda":
        raise ValueError(
            f"device must be cuda for backend 'triton', got {device}; use backend='reference', or "
            "set TRITON_INTERPRET=1 before the start to run the kernels slowly on a CPU"
        )
