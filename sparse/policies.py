"""Policies turn block scores into a block mask within a budget."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from gossamer.kernels.block_select.op import hybrid_select
from gossamer.sparse.mask import BlockMask, BlockScores


class Hybrid(nn.Module):
    """The union of Top-k and Top-p per row (SpargeAttention2, Eq. 9), with one budget per head.

    Both sets are prefixes of one order, so the union is the longer prefix. k is the share of the
    row's blocks, p the score mass to reach; the block that crosses p is kept unless keep_crossing
    is False (SpargeAttention's convention), p >= 1 keeps all, and at least one block a row is kept.
    Ties go to the lower block index. Blocks that the estimator forces are kept beside the budget.
    """

    k: Tensor  # fp32 [H] or [1]
    p: Tensor  # fp32 [H] or [1]

    def __init__(
        self, *, k: float = 0.1, p: float = 0.0, keep_crossing: bool = True, num_heads: int = 1
    ) -> None:
        super().__init__()
        self.keep_crossing = keep_crossing
        self.register_buffer("k", _share("k", torch.full((num_heads,), float(k))))
        self.register_buffer("p", _share("p", torch.full((num_heads,), float(p))))

    def for_heads(self, num_heads: int) -> Self:
        """Return a policy of the same budget with its own k and p for each of the heads."""
        return type(self)(
            k=float(self.k[0]),
            p=float(self.p[0]),
            keep_crossing=self.keep_crossing,
            num_heads=num_heads,
        )

    def set_budget(self, k: Tensor, p: Tensor) -> None:
        """Set each head's k and p, both [H]."""
        self.k.copy_(_share("k", k))
        self.p.copy_(_share("p", p))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model but stay fp32: model.to(torch.bfloat16) would round the budgets."""
        k, p = self.k, self.p
        super()._apply(fn, recurse)
        self.k, self.p = k.to(self.k.device), p.to(self.p.device)
        return self

    def forward(self, scores: BlockScores) -> BlockMask:
        selected = hybrid_select(scores.score, self.k, self.p, keep_crossing=self.keep_crossing)
        if scores.forced is not None:
            selected = selected | scores.forced
        return BlockMask(scores.q_layout, scores.kv_layout, selected)


def _share(field: str, value: Tensor) -> Tensor:
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{field}={value.tolist()}: allowed is a share from 0 to 1; e.g. {field}=0.1"
        )
    return value.float()
