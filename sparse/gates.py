"""Gates: how trainable masks get gradients though the mask itself is hard.

A gate is a number for a pair of blocks that is exactly 0 forward; backward it receives the
gradient of the loss with respect to selecting that pair (the gate gradient, kernels/block_gate).
What decides the mask writes each gate as a function of its parameters (straight-through).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gossamer.sparse.mask import BlockMask, BlockScores, text_pairs


@dataclass(frozen=True, eq=False)
class Band:
    """The blocks of each row on both sides of its threshold: where a small change would act.

    The first half of the columns are the selected blocks of least score, nearest the threshold
    first; the second half the unselected blocks of greatest score, likewise. With `by_pair` it is
    the score over tokens that counts, as for a budget of token pairs.
    """

    column: Tensor  # int64 [B, H, Nq, 2 M], kv blocks
    score: Tensor  # fp32, theirs
    area: Tensor  # fp32, their share of all real token pairs
    valid: Tensor  # bool, whether the side has so many blocks, and score and budget decide on this
    count: Tensor  # int64 [B, H, Nq], blocks that the budget selects in the row
    by_pair: bool = False

    @property
    def side(self) -> int:
        return self.column.shape[-1] // 2


@dataclass(frozen=True, eq=False)
class Gate:
    """The gates of some pairs of blocks: 0 forward, the gate gradient backward."""

    value: Tensor  # fp32 [B, H, Nq, M]
    column: Tensor  # int64 [B, H, Nq, M]


@runtime_checkable
class Gated(Protocol):
    """A part of the mask that learns: it needs `side` blocks on either side of the threshold."""

    side: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the mask parameters."""

    def gate(self, q: Tensor, k: Tensor, band: Band, mask: BlockMask) -> Tensor:
        """Return a gate for each pair of the band, 0 and differentiable in the parameters."""


@torch.no_grad()
def find_band(scores: BlockScores, mask: BlockMask, side: int, *, by_pair: bool = False) -> Band:
    """Return up to `side` blocks on each side of the threshold of each row of a policy's mask."""
    score, selected, forced = scores.score.float(), mask.selected, scores.forced
    rank = score / scores.kv_layout.sizes.clamp(min=1)[..., None, :] if by_pair else score
    side = min(side, score.shape[-1])
    free = selected if forced is None else selected & ~forced
    last = torch.where(free, -rank, -torch.inf).topk(side, dim=-1)
    first = torch.where(selected, -torch.inf, rank).topk(side, dim=-1)
    column = torch.cat([last.indices, first.indices], -1)
    text = text_pairs(mask.q_layout, mask.kv_layout)
    valid = torch.cat([last.values, first.values], -1) > -torch.inf
    if text is not None:
        valid = valid & ~text.expand_as(selected).gather(-1, column)
    count = selected.sum(-1)
    if forced is not None:  # of the prefix that ends with the last free block
        count = (rank >= -last.values[..., :1]).sum(-1)
    q_share, kv_share = (
        x.sizes / x.sizes.sum(-1, keepdim=True) for x in (scores.q_layout, scores.kv_layout)
    )
    area = q_share[..., None] * of_column(kv_share, column)
    return Band(column, score.gather(-1, column), area, valid, count, by_pair)


def of_column(x: Tensor, column: Tensor) -> Tensor:
    """Return the values of kv blocks, x [Nk] or [B, H, Nk], at column [B, H, Nq, M]."""
    *rows, _ = column.shape
    return x[..., None, :].expand(*rows, x.shape[-1]).gather(-1, column)
