"""SpargeAttention's estimator: attention between block means (arXiv 2502.18137, section 3)."""

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores


class MeanPool:
    """Score blocks by the softmax of scale * mean(q) . mean(k) + ln n, n the block's tokens."""

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order; each row sums to 1."""
        q_mean = block_mean(q, q_layout.offsets, q_layout.block_size).float()
        # Subtracting the mean key shifts each row of logits by a constant: only rounding changes.
        k_mean = block_mean(k, kv_layout.offsets, kv_layout.block_size).float()
        k_mean = k_mean - k_mean.mean(2, keepdim=True)
        logits = q_mean @ k_mean.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, Nq, Nk]
        return BlockScores(q_layout, kv_layout, (logits + kv_layout.sizes.log()).softmax(-1))
