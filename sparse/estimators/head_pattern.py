"""SVG1's estimator: a band in each head's own order (arXiv 2502.01776)."""

import torch
from torch import Tensor

from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.layouts.head_pattern import NEITHER, PatternLayout
from gossamer.sparse.layouts.head_pattern import HeadPattern as HeadPatternLayout
from gossamer.sparse.mask import BlockScores


class HeadPattern:
    """Score blocks by their distance along the head's band and from the sinks; it needs its layout.

    Any prefix of a row is text, then by turns a block of the first frames, those at a like place in
    the frame first, and one of a band that widens with the budget. Each row sums to 1 but is no
    attention mass: give k, not p. A head with neither pattern gets the scores of MeanPool, which
    are.
    """

    needs_layout = HeadPatternLayout

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order."""
        assert isinstance(q_layout, PatternLayout) and isinstance(kv_layout, PatternLayout)
        score = q_layout.score[q_layout.pattern]  # [B, H, Nq, Nk]
        if q_layout.may_be_neither:
            mass = MeanPool()(q, k, v, q_layout, kv_layout).score
            score = mass.where((q_layout.pattern == NEITHER)[..., None, None], score)
        return BlockScores(q_layout, kv_layout, score)
