"""Index lists of a block mask: the selected columns of each row, and the transpose."""

import torch
from torch import Tensor

from ..backend import choose_backend


def block_lists(
    selected: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return num_columns, columns, num_rows and rows of selected, int32; deterministic, no sync.

    num_columns [B, H, R] counts the selected columns of each row and columns [B, H, R, C] lists
    them in ascending order, 0 past the count; num_rows [B, H, C] and rows [B, H, C, R] are the same
    of the transposed mask.

    Args:
        selected: bool [B, H, R, C].
        backend: "auto" (triton on CUDA, else reference), "reference" or "triton".

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    if selected.ndim != 4 or selected.dtype != torch.bool:
        raise ValueError(
            f"selected must be bool [B, H, R, C], got {selected.dtype} {list(selected.shape)}; "
            "take it from a block mask"
        )
    match choose_backend(backend, selected.device, selected.dtype):
        case "reference":
            from .reference import forward
        case "triton":
            from .triton import forward
    return forward(selected)
