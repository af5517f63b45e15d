"""Mean of the tokens of each block."""

from torch import Tensor

from ..backend import choose_backend
from ..check import check_offsets


def block_mean(x: Tensor, offsets: Tensor, block_size: int, *, backend: str = "auto") -> Tensor:
    """Return the mean of each block, [B, H, N, D]; differentiable and deterministic, no sync.

    Sums and result are fp32 (fp64 for fp64 inputs) and each block is divided by its own number of
    tokens. An empty block has mean 0.

    Args:
        x: [B, H, S, D], of any strides.
        offsets: [N + 1] or [B, H, N + 1], first token of each block, rising from 0 to S.
        block_size: tokens of the largest block, or more.
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton".

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    _check(x, offsets, block_size)
    match choose_backend(backend, x.device, x.dtype):
        case "reference":
            from .reference import forward
        case "triton":
            from .triton import forward
    return forward(x, offsets, block_size)


def block_mean_pair(
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    x_block_size: int,
    y_block_size: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return block_mean of x and of y, which share B, H, D and dtype, in one launch."""
    _check(x, x_offsets, x_block_size)
    _check(y, y_offsets, y_block_size)
    if x.shape[:2] != y.shape[:2] or x.shape[3] != y.shape[3] or x.dtype != y.dtype:
        raise ValueError(
            f"x and y must share B, H, D and dtype, got {x.dtype} {list(x.shape)} and {y.dtype} "
            f"{list(y.shape)}; call block_mean on each"
        )
    match choose_backend(backend, x.device, x.dtype):
        case "reference":
            from .reference import forward_pair
        case "triton":
            from .triton import forward_pair
    return forward_pair(x, y, x_offsets, y_offsets, x_block_size, y_block_size)


def _check(x: Tensor, offsets: Tensor, block_size: int) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating-point [B, H, S, D] tensor, got {x.dtype} {list(x.shape)}; "
            "unflatten the heads first"
        )
    check_offsets("offsets", offsets, x, block_size)
