"""SpargeAttention's estimator: attention between block means (arXiv 2502.18137, section 3)."""

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean_pair
from gossamer.kernels.block_score.op import block_score
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores


class MeanPool:
    """Score blocks by the softmax of scale * mean(q) . mean(k) + ln n, n the block's tokens."""

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order; each row sums to 1."""
        q_mean, k_mean = block_mean_pair(
            q, k, q_layout.offsets, kv_layout.offsets, q_layout.block_size, kv_layout.block_size
        )
        score = block_score(q_mean.float(), k_mean.float(), kv_layout.offsets)
        return BlockScores(q_layout, kv_layout, score)
