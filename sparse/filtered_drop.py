"""Drop with SpargeAttention's second filter: values that weigh little are skipped as well."""

import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import filtered_attention
from gossamer.kernels.blocks import Blocks
from gossamer.sparse.fp32 import Fp32Module
from gossamer.sparse.gates import Gate


class FilteredDrop(Fp32Module):
    """Leave out unselected blocks, and the values of tiles far below each query's running maximum.

    `skip_below` is the gap of logits beyond which a tile's P V is skipped, one for each head
    (arXiv 2502.18137, section 3); -inf skips nothing. For inference only: there is no backward.
    """

    skip_below: Tensor  # fp32 [H] or [1]

    def __init__(self, *, skip_below: float = -10.0, num_heads: int = 1) -> None:
        super().__init__()
        limit = torch.full((num_heads,), float(skip_below))
        self.register_buffer("skip_below", _limit(limit))

    def set_limit(self, skip_below: Tensor) -> None:
        """Set each head's limit, [H], in units of the natural logarithm, at most 0."""
        self.skip_below.copy_(_limit(skip_below))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        """Return attention of q, k, v [B, H, S, D] in block order, without gradient."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "compensation=filtered_drop: allowed is inference, it has no backward; "
                "train with compensation=drop"
            )
        backend = "reference" if backend == "reference" else "triton"  # hopper has no filter
        return filtered_attention(q, k, v, blocks, self.skip_below, backend=backend)[0]


def _limit(value: Tensor) -> Tensor:
    if not bool((value <= 0).all()):
        raise ValueError(f"skip_below={value.tolist()}: allowed is at most 0; e.g. skip_below=-10")
    return value.float()
