"""SVG-EAR's estimator: what each block costs when its mean stands for it (arXiv 2603.08982)."""

import torch
from torch import Tensor

from gossamer.kernels.block_error.op import KINDS, block_error
from gossamer.kernels.block_pool.op import block_mean
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockScores


class ErrorAware:
    """Score blocks by their share of the row's error under centroid compensation.

    `output` is the squared change of the output of the q block's mean query; it compares across
    rows, heads and layers. `keys` is the released score (Eq. 8), which compares within a row only.
    """

    def __init__(self, *, kind: str = "output") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind}: allowed is {' or '.join(KINDS)}; set kind=output")
        self.kind = kind
        self.gives = ("mass", "error") if kind == "output" else ("mass",)

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order; each row sums to 1."""
        q_mean = block_mean(q, q_layout.offsets, q_layout.block_size)
        found = block_error(q_mean, k, v, kv_layout.offsets, kv_layout.block_size, kind=self.kind)
        mass = found.log_mass.exp().float()
        total = found.log_error.logsumexp(-1, keepdim=True)  # [B, H, Nq, 1]
        # A row of blocks without any error, e.g. of one token each, goes by mass.
        score = torch.where(total > -torch.inf, found.log_error.softmax(-1).float(), mass)
        error = total[..., 0].exp().float() if self.kind == "output" else None
        return BlockScores(q_layout, kv_layout, score, mass=mass, error=error)
