"""Mean of the tokens of each block."""

from torch import Tensor

from ..check import check_offsets


def block_mean(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return the mean of each block, [B, H, N, D]; differentiable and deterministic, no sync.

    Sums and result are fp32 (fp64 for fp64 inputs) and each block is divided by its own number of
    tokens. An empty block has mean 0.

    Args:
        x: [B, H, S, D].
        offsets: [N + 1], first token of each block, rising from 0 to S.
        block_size: tokens of the largest block.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating-point [B, H, S, D] tensor, got {x.dtype} {list(x.shape)}; "
            "unflatten the heads first"
        )
    check_offsets("offsets", offsets, x, block_size)
    from .reference import forward

    return forward(x, offsets, block_size)
