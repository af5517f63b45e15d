"""Block-sparse attention: exact attention of each q block to the kv blocks selected for it."""

import torch
from torch import Tensor

from ..backend import check_triton, stands_for_gpu
from ..blocks import Blocks
from ..check import check_attention

BACKENDS = ("reference", "triton", "hopper")
_MAX_FILTERED_BLOCK = 128
_TRITON_HEAD_DIMS = (16, 32, 64, 128)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        backend: "reference" (plain PyTorch, any device), "triton", "hopper" (H100 and H200) or
            "auto", the fastest of them for these inputs; see `choose_backend`.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    backend = backend_for(backend, q, blocks)
    match backend:
        case "reference":
            from . import reference

            return reference.forward(q, k, v, blocks, scale)
        case _:
            from . import operator

            return operator.forward(q, k, v, blocks, scale, backend)


@torch.no_grad()
def filtered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    skip_below: Tensor,
    *,
    scale: float | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return block_sparse_attention without the values that weigh little, for inference only.

    Each q block meets its kv blocks in ascending order, in tiles of at most 64 x 64 tokens. A tile
    whose logits lie below the running maximum of every one of its queries, by more than
    `skip_below` says, adds to the softmax's denominator but not to the output: P V is skipped
    (SpargeAttention, arXiv 2502.18137, section 3). So the lse stays that of block_sparse_attention.

    Args:
        q: [B, H, Sq, D]; k and v [B, H, Sk, D], blocks, scale: as in block_sparse_attention.
        skip_below: [H] or [1], fp32, at most 0, in units of the natural logarithm: a tile is
            skipped if max over its queries of (tile's maximum - running maximum) is below it.
        backend: "reference" (plain PyTorch, any device), "triton" (blocks of up to 128 tokens) or
            "auto", triton on CUDA for such blocks.

    Returns:
        out [B, H, Sq, D], lse [B, H, Sq], and the share of the tiles skipped, fp32 [B, H].

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    if skip_below.shape not in ((1,), (q.shape[1],)) or skip_below.dtype != torch.float32:
        raise ValueError(
            f"skip_below must be float32 of shape [1] or [{q.shape[1]}], one a head, got "
            f"{skip_below.dtype} {list(skip_below.shape)}; pass e.g. torch.tensor([-10.0])"
        )
    if skip_below.device != q.device:
        raise ValueError(
            f"skip_below must be on q's device {q.device}, got {skip_below.device}; move it there"
        )
    if q.device.type == "cpu" and not bool((skip_below <= 0).all()):
        raise ValueError(
            f"skip_below must be at most 0, got {skip_below.tolist()}; "
            "the tile that holds a query's maximum is never skipped"
        )
    largest = max(blocks.q_block_size, blocks.kv_block_size)
    if backend == "auto":
        fits = q.device.type == "cuda" and largest <= _MAX_FILTERED_BLOCK
        backend = "triton" if fits else "reference"
    match backend:
        case "reference":
            from .reference import filtered
        case "triton":
            backend_for(backend, q, blocks)
            if largest > _MAX_FILTERED_BLOCK:
                raise ValueError(
                    f"blocks must have at most {_MAX_FILTERED_BLOCK} tokens for backend 'triton' "
                    f"with skip_below, got {largest}; use smaller blocks or backend='reference'"
                )
            from .triton import filtered
        case _:
            raise ValueError(
                "backend must be 'auto', 'reference' or 'triton' with skip_below, "
                f"got {backend!r}; use 'auto'"
            )
    return filtered(q, k, v, blocks, skip_below, scale)


def backend_for(backend: str, q: Tensor, blocks: Blocks) -> str:
    """Return what `choose_backend` says for q [B, H, Sq, D] and blocks."""
    return choose_backend(
        backend,
        head_dim=q.shape[-1],
        dtype=q.dtype,
        device=q.device,
        q_block_size=blocks.q_block_size,
        kv_block_size=blocks.kv_block_size,
        is_uniform=blocks.is_uniform,
    )


def choose_backend(
    backend: str,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    q_block_size: int,
    kv_block_size: int,
    is_uniform: bool,
) -> str:
    """Return the backend that runs such inputs: the named one, or for "auto" the fastest.

    "auto" is hopper where the GPU and the shapes allow it, else triton on CUDA, and reference on a
    CPU. Needs no tensor.

    Raises:
        ValueError: if the named backend cannot run them; it is never replaced by another.
    """
    device = torch.device(device)
    sizes = (("q_block_size", q_block_size), ("kv_block_size", kv_block_size))
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}; use 'auto'"
        )
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype must be float32, float16, bfloat16 or float64 ('reference' only), got {dtype}; "
            "convert q, k and v"
        )
    if backend == "auto" and not stands_for_gpu(device):
        return "reference"
    if backend in ("auto", "hopper"):
        why_not = _why_not_hopper(head_dim, dtype, device, sizes, is_uniform)
        if not why_not:
            return "hopper"
        if backend == "hopper":
            raise ValueError(f"{why_not} for backend 'hopper'; use backend='triton' or 'auto'")
        backend = "triton"
    if backend == "triton":
        _check_triton_shapes(head_dim, dtype)
        check_triton(device, dtype)
    return backend


def _why_not_hopper(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[tuple[str, int], ...],
    is_uniform: bool,
) -> str:
    """Return why the hopper backend cannot run such inputs, or an empty string if it can."""
    if head_dim not in (64, 128):
        return f"head dim must be 64 or 128, got {head_dim},"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {dtype},"
    for name, size in sizes:
        if size not in (64, 128):
            return f"{name} must be 64 or 128 tokens, got {size},"
    if not is_uniform:
        return "blocks must all be full but the last (is_uniform), got blocks of several sizes,"
    return _why_no_hopper_device(device)


# torch.compile runs it once, while tracing.
@torch.compiler.assume_constant_result
def _why_no_hopper_device(device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return f"device must be an H100, H200 or other GPU of capability 9.0, got {device},"
    import triton

    if triton.__version__.split(".")[:2] != ["3", "6"]:  # its language, Gluon, changes
        return f"Triton must be 3.6, got {triton.__version__},"
    return ""


def _check_triton_shapes(head_dim: int, dtype: torch.dtype) -> None:
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
