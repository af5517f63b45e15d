"""Blocks: which kv blocks each q block attends to, as the index lists the kernels walk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_lists.op import block_lists


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """Selected kv blocks of every q block, the transposed lists, and where the blocks lie.

    Block i of the queries holds the tokens q_offsets[i] <= s < q_offsets[i + 1]; an empty block is
    allowed. Offsets start at 0 and end at the number of tokens. All tensors are int32, contiguous.

    Args:
        kv_num_blocks: [B, H, Nq], how many kv blocks each q block attends to.
        kv_indices: [B, H, Nq, Nk], those kv blocks in ascending order; 0 past the count.
        q_num_blocks: [B, H, Nk], how many q blocks attend to each kv block.
        q_indices: [B, H, Nk, Nq], those q blocks in ascending order; 0 past the count.
        q_offsets: first token of each q block, [Nq + 1], or [B, H, Nq + 1] for one per head.
        kv_offsets: first token of each kv block, [Nk + 1] or [B, H, Nk + 1].
        q_block_size: tokens of the largest q block, or more.
        kv_block_size: tokens of the largest kv block, or more.
        is_uniform: on both sides every block but the last holds block_size tokens.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    q_offsets: Tensor
    kv_offsets: Tensor
    q_block_size: int
    kv_block_size: int
    is_uniform: bool = False

    @classmethod
    def from_selected(
        cls,
        selected: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        q_block_size: int,
        kv_block_size: int,
        is_uniform: bool = False,
    ) -> "Blocks":
        """Build both lists from selected, bool [B, H, Nq, Nk]; deterministic, no sync."""
        expected = (q_offsets.shape[-1] - 1, kv_offsets.shape[-1] - 1)
        if selected.dtype != torch.bool or selected.ndim != 4 or selected.shape[2:] != expected:
            raise ValueError(
                f"selected must be bool [B, H, {expected[0]}, {expected[1]}] to match the offsets, "
                f"got {selected.dtype} {list(selected.shape)}; build it from the same block layouts"
            )
        kv_num_blocks, kv_indices, q_num_blocks, q_indices = block_lists(selected)
        return cls(
            kv_num_blocks=kv_num_blocks,
            kv_indices=kv_indices,
            q_num_blocks=q_num_blocks,
            q_indices=q_indices,
            q_offsets=q_offsets.to(torch.int32).contiguous(),
            kv_offsets=kv_offsets.to(torch.int32).contiguous(),
            q_block_size=q_block_size,
            kv_block_size=kv_block_size,
            is_uniform=is_uniform,
        )

    def selected(self) -> Tensor:
        """Return the lists as bool [B, H, Nq, Nk]."""
        num_kv = self.kv_indices.shape[-1]
        past = torch.arange(num_kv, device=self.kv_indices.device) >= self.kv_num_blocks[..., None]
        column = self.kv_indices.masked_fill(past, num_kv).long()  # num_kv: a column cut off below
        found = torch.zeros(*column.shape[:-1], num_kv + 1, dtype=torch.bool, device=column.device)
        return found.scatter_(-1, column, True)[..., :num_kv]


def block_of_token(offsets: Tensor, num_tokens: int) -> Tensor:
    """Return the block of each token, int64 [..., num_tokens], of offsets [..., N + 1]; no sync."""
    token = torch.arange(num_tokens, dtype=offsets.dtype, device=offsets.device)
    token = token.expand(*offsets.shape[:-1], num_tokens).contiguous()
    return torch.searchsorted(offsets[..., 1:].contiguous(), token, right=True)


def head_stride(offsets: Tensor) -> int:
    """Return how far apart the offsets of two heads are: 0 where all heads share them."""
    return offsets.shape[-1] if offsets.ndim == 3 else 0
