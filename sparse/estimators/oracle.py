"""The true attention mass of each pair of blocks: the yardstick of estimators, not a fast path."""

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores


class Oracle:
    """Score blocks by their dense attention mass, averaged over the rows of the q block."""

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k [B, H, S, D] in block order; needs one head's S x S at a time."""
        rows = []
        for query, key in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True):  # [S, D]
            mass = (query.float() @ key.float().T * q.shape[-1] ** -0.5).softmax(-1)  # [Sq, Sk]
            columns = _block_sum(mass.T, kv_layout)  # [Nk, Sq]
            rows.append(_block_sum(columns.T, q_layout) / q_layout.sizes[:, None])
        score = torch.stack(rows).unflatten(0, q.shape[:2])
        return BlockScores(q_layout, kv_layout, score)


def _block_sum(x: Tensor, layout: BlockLayout) -> Tensor:
    """Sum x [S, W] over the rows of each block: [N, W]."""
    mean = block_mean(x[None, None], layout.offsets, layout.block_size)[0, 0]
    return mean * layout.sizes[:, None]
