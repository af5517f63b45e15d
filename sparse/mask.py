"""Block scores and the block mask that a policy makes of them."""

from dataclasses import dataclass

from torch import Tensor

from gossamer.kernels.blocks import Blocks
from gossamer.sparse.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class BlockScores:
    """How much each pair of blocks is worth computing exactly; rows of attention mass sum to 1."""

    q_layout: BlockLayout
    kv_layout: BlockLayout
    score: Tensor  # fp32 [B, H, Nq, Nk]
    forced: Tensor | None = None  # bool [B, H, Nq, Nk], selected whatever the score and the budget
    mass: Tensor | None = None  # attention mass where score is another share; rows sum to 1
    error: Tensor | None = None  # fp32 [B, H, Nq], what score shares out: compares across rows

    @property
    def given(self) -> tuple[str, ...]:
        """Return what is there beside the score; an estimator names the same in `gives`."""
        return tuple(name for name in ("mass", "error") if getattr(self, name) is not None)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which pairs of blocks are computed exactly."""

    q_layout: BlockLayout
    kv_layout: BlockLayout
    selected: Tensor  # bool [B, H, Nq, Nk]

    @property
    def density(self) -> Tensor:
        """Return the share of real query-key token pairs computed exactly, fp64 [B, H]."""
        q_sizes, kv_sizes = self.q_layout.sizes.double(), self.kv_layout.sizes.double()
        kept = (self.selected.double() @ kv_sizes[..., None]).squeeze(-1)  # [B, H, Nq]
        return (kept * q_sizes).sum(-1) / (q_sizes.sum(-1) * kv_sizes.sum(-1))

    def of_first(self, samples: int) -> "BlockMask":
        """Return the mask of the first samples of the batch."""
        q_layout, kv_layout = (x.of_first(samples) for x in (self.q_layout, self.kv_layout))
        return BlockMask(q_layout, kv_layout, self.selected[:samples])

    def captured(self, mass: Tensor) -> Tensor:
        """Return the share of attention mass [B, H, Nq, Nk] that is selected, fp32 [B, H]."""
        kept = (mass * self.selected).sum(-1)  # [B, H, Nq]
        weight = self.q_layout.sizes.to(kept.dtype)
        return (kept * weight).sum(-1) / weight.sum(-1)

    @property
    def blocks(self) -> Blocks:
        """Return the index record that the kernels take, made anew: of all masks it is the bulk.

        A layer keeps its mask for the recompute of gradient checkpointing. Kept along, the lists
        would take as much as a third of what checkpointing leaves (14B at 720p).
        """
        return Blocks.from_selected(
            self.selected,
            self.q_layout.offsets,
            self.kv_layout.offsets,
            self.q_layout.block_size,
            self.kv_layout.block_size,
            is_uniform=self.q_layout.is_uniform and self.kv_layout.is_uniform,
        )


def text_pairs(q_layout: BlockLayout, kv_layout: BlockLayout) -> Tensor | None:
    """Return the pairs of blocks that are always exact, bool [Nq, Nk]: all with text; None if none.

    The one rule for text, for masks, their costs and their gates alike.
    """
    if q_layout.text is None or kv_layout.text is None:
        return None
    return q_layout.text[:, None] | kv_layout.text[None, :]


def keep_text(mask: BlockMask) -> BlockMask:
    """Select every row and every column of text blocks; without text the mask is returned as is."""
    text = text_pairs(mask.q_layout, mask.kv_layout)
    if text is None:
        return mask
    return BlockMask(mask.q_layout, mask.kv_layout, mask.selected | text)
