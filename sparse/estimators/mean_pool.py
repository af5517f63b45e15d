"""SpargeAttention's estimator: attention between block means (arXiv 2502.18137, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean_pair
from gossamer.kernels.block_score.op import block_score
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores


class MeanPool:
    """Score blocks by the softmax of scale * mean(q) . mean(k) + ln n, n the block's tokens.

    A mean stands for its block only if the tokens are alike. With `similarity`, the rows of q
    blocks and the columns of k blocks whose self-similarity is lower are computed exactly, beside
    the budget, and such columns take no part in the softmax. Self-similarity is the mean of the
    Gram matrix of the normalised tokens, from 0 to 1, for k of those less their mean over the
    sequence (as released: what all keys share makes them look alike, but moves no softmax). Since
    sum_ij x_i . x_j = |sum_i x_i|^2, that is the squared length of the mean normalised token: no
    Gram matrix is formed.
    """

    def __init__(self, *, similarity: float | None = None) -> None:
        if similarity is not None and not 0 <= similarity <= 1:
            raise ValueError(
                f"similarity={similarity}: allowed is 0 to 1, or null for no guard; e.g. 0.6"
            )
        self.similarity = similarity

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order; each row sums to 1, or is all 0."""
        q_mean, k_mean = _means(q, k, q_layout, kv_layout)
        score = block_score(q_mean.float(), k_mean.float(), kv_layout.offsets)
        if self.similarity is None:
            return BlockScores(q_layout, kv_layout, score)
        q_alike, k_alike = (
            similarity >= self.similarity
            for similarity in self_similarity(q, k, q_layout, kv_layout)
        )
        score = score * k_alike[..., None, :]
        score /= score.sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
        forced = ~(q_alike[..., :, None] & k_alike[..., None, :])
        return BlockScores(q_layout, kv_layout, score, forced=forced)


def self_similarity(
    q: Tensor, k: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """Return the self-similarity of the blocks of q and of k, [B, H, Nq] and [B, H, Nk]."""
    q, k = F.normalize(q, dim=-1), F.normalize(k - k.mean(-2, keepdim=True), dim=-1)
    q_mean, k_mean = _means(q, k, q_layout, kv_layout)
    return q_mean.square().sum(-1), k_mean.square().sum(-1)


def _means(
    q: Tensor, k: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    return block_mean_pair(
        q, k, q_layout.offsets, kv_layout.offsets, q_layout.block_size, kv_layout.block_size
    )
