"""The true attention mass of each pair of blocks: the yardstick of estimators, not a fast path."""

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.sparse.fp32 import no_autocast
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores

_MAX_LOGITS = 1 << 28  # held at once: 1 GiB of fp32


class Oracle:
    """Score blocks by their dense attention mass, averaged over the rows of the q block."""

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k [B, H, S, D] in block order; some rows of a head at a time."""
        with no_autocast(q):
            return self._scores(q, k, q_layout, kv_layout)

    def _scores(
        self, q: Tensor, k: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        heads = q.shape[:2]
        q_offsets, kv_offsets = (
            layout.offsets.expand(*heads, -1).flatten(0, 1) for layout in (q_layout, kv_layout)
        )
        rows = []
        for i, (query, key) in enumerate(zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)):
            parts = []
            for some in query.split(max(1, _MAX_LOGITS // len(key))):
                mass = (some.float() @ key.float().T * q.shape[-1] ** -0.5).softmax(-1)
                parts.append(_means(mass.T, kv_offsets[i], kv_layout.block_size))  # [Nk, some]
            columns = torch.cat(parts, 1) * kv_offsets[i].diff()[:, None]  # [Nk, Sq]
            rows.append(_means(columns.T, q_offsets[i], q_layout.block_size))
        score = torch.stack(rows).unflatten(0, heads)
        return BlockScores(q_layout, kv_layout, score)


def _means(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return the mean of x [S, W] over the rows of each block, [N, W]."""
    return block_mean(x[None, None], offsets, block_size)[0, 0]
