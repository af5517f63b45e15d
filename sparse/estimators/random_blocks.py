"""Random blocks: the floor that any estimator must beat."""

from typing import Self

import torch
from torch import Tensor, nn

from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores

_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)  # splitmix64's, below 2^62


class RandomBlocks(nn.Module):
    """Score each pair of blocks of a head by chance, the same in every layer, sample and step.

    A hash of seed, head, row and column, so that all devices agree. Each row sums to 1 but is no
    attention mass: give k, not p.
    """

    head: Tensor | None  # int64 [H], their numbers where processes share the layer's heads

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed={seed}: allowed is a whole number of at least 0; e.g. seed=0")
        self.seed = seed
        self.register_buffer("head", None, persistent=False)

    def for_heads(self, num_heads: int, head_dim: int | None = None) -> Self:
        """Return the same that knows the numbers of the heads."""
        own = type(self)(seed=self.seed)
        own.head = torch.arange(num_heads)
        return own

    @torch.no_grad()
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order."""
        sizes = q.shape[1], q_layout.sizes.shape[-1], kv_layout.sizes.shape[-1]
        head, row, column = (torch.arange(n, device=q.device) for n in sizes)
        head = head if self.head is None else self.head
        place = (head[:, None, None] * sizes[1] + row[:, None]) * sizes[2] + column  # [H, Nq, Nk]
        bits = (place + 1 + self.seed * 1_000_003) * _MIX[0]
        for factor in _MIX[1:]:
            bits = (bits ^ (bits >> 29)) * factor
        score = ((bits >> 33) & 0x3FFFFFFF).float() + 1
        score = score / score.sum(-1, keepdim=True)
        return BlockScores(q_layout, kv_layout, score.expand(len(q), -1, -1, -1))
