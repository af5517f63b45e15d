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

from gossamer.sparse.mask import BlockMask, BlockScores


@dataclass(frozen=True, eq=False)
class Band:
    """The blocks of each row on both sides of its threshold: where a small change would act.

    The first half of the columns are the selected blocks of least score, nearest the threshold
    first; the second half the unselected blocks of greatest score, likewise.
    """

    column: Tensor  # int64 [B, H, Nq, 2 M], kv blocks
    score: Tensor  # fp32, theirs
    area: Tensor  # fp32, their share of all real token pairs
    valid: Tensor  # bool, whether the side has so many blocks and the block is not kept as text
    count: Tensor  # int64 [B, H, Nq], selected blocks of the row

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
def find_band(scores: BlockScores, mask: BlockMask, side: int) -> Band:
    """Return up to `side` blocks on each side of the threshold of each row of a policy's mask."""
    score, selected = scores.score.float(), mask.selected
    side = min(side, score.shape[-1])
    last = torch.where(selected, -score, -torch.inf).topk(side, dim=-1)
    first = torch.where(selected, -torch.inf, score).topk(side, dim=-1)
    column = torch.cat([last.indices, first.indices], -1)
    q_text, kv_text = mask.q_layout.text, mask.kv_layout.text
    valid = torch.cat([last.values, first.values], -1) > -torch.inf
    if q_text is not None and kv_text is not None:
        valid = valid & ~kv_text[column] & ~q_text[:, None]
    q_sizes, kv_sizes = (x.sizes.float() for x in (mask.q_layout, mask.kv_layout))
    shares = (kv_sizes / kv_sizes.sum(-1, keepdim=True))[..., None, :].expand_as(score)
    q_share = (q_sizes / q_sizes.sum(-1, keepdim=True))[..., None]
    area = q_share * shares.gather(-1, column)
    return Band(column, score.gather(-1, column), area, valid, selected.sum(-1))
