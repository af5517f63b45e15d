"""Centroid attention: every block that is not selected takes part as one column, its centroid."""

from torch import Tensor

from ..blocks import Blocks
from ..check import check_attention


def centroid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    scale: float | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq] over the centroids of the unselected kv blocks.

    A block of n > 0 tokens that the q block has not selected adds one column with the logit
    scale * q . mean(k) + ln n and the value mean(v), as in SVG-EAR. Merged with the exact part it
    stands for the tokens left out. A query whose block selected every block has out 0, lse -inf and
    gradient 0. Arguments and errors are those of `block_sparse_attention`.
    """
    scale = check_attention(q, k, v, blocks, scale)
    match backend:
        case "reference":
            from .reference import forward
        case _:
            raise ValueError(f"backend must be 'reference', got {backend!r}; leave it out")
    return forward(q, k, v, blocks, scale)
