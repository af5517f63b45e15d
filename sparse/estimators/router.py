"""A learned router: pooled q and k through small projections (SLA2, arXiv 2602.12675)."""

import math
from copy import deepcopy
from typing import Self

import torch
from torch import Tensor, nn

from gossamer.kernels.block_pool.op import block_mean, block_mean_pair
from gossamer.kernels.block_score.op import block_score
from gossamer.sparse.fp32 import Fp32Module, no_autocast
from gossamer.sparse.gates import Band, of_column
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockMask, BlockScores


class Router(Fp32Module):
    """MeanPool on projected block means; each head's projections are I + change, change 0 at first.

    The mask stays hard. Backward it is SLA2's SoftTop-k, sigmoid(logit / temperature + a constant
    of the row that holds its number of blocks, or of tokens where the policy counts those), on the
    `side` blocks on each side of the row's threshold, fed by their gate gradients; further blocks
    would move too little to matter. With `detach` the gradient ends at the projections, else it
    also reaches q and k.
    """

    def __init__(self, *, temperature: float = 0.1, side: int = 8, detach: bool = True) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature={temperature}: allowed is a number above 0; e.g. temperature=0.1"
            )
        if int(side) != side or side < 1:
            raise ValueError(f"side={side}: allowed is an integer of at least 1; e.g. side=8")
        self.temperature, self.side, self.detach = temperature, side, detach
        self.q_change: Tensor | None
        self.k_change: Tensor | None
        self.register_parameter("q_change", None)
        self.register_parameter("k_change", None)

    def for_heads(self, num_heads: int, head_dim: int | None = None) -> Self:
        """Return a router with projections of its own; without a head dim it stays MeanPool."""
        own = deepcopy(self)
        if head_dim is not None:
            own.q_change = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
            own.k_change = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
        return own

    @torch.no_grad()
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [B, H, S, D] in block order; each row sums to 1."""
        q_mean, k_mean = block_mean_pair(
            q, k, q_layout.offsets, kv_layout.offsets, q_layout.block_size, kv_layout.block_size
        )
        q_mean, k_mean = self._project(q_mean.float(), k_mean.float())
        return BlockScores(q_layout, kv_layout, block_score(q_mean, k_mean, kv_layout.offsets))

    def gate(self, q: Tensor, k: Tensor, band: Band, mask: BlockMask) -> Tensor:
        """Return a gate for each pair of the band, [B, H, Nq, 2 M]; rows keep their budget."""
        if self.detach:
            q, k = q.detach(), k.detach()
        q_mean = block_mean(q, mask.q_layout.offsets, mask.q_layout.block_size)
        k_mean = block_mean(k, mask.kv_layout.offsets, mask.kv_layout.block_size)
        q_mean, k_mean = self._project(q_mean, k_mean)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        head = torch.arange(q.shape[1], device=q.device)[:, None, None]
        near = k_mean[batch, head, band.column]  # [B, H, Nq, 2 M, D]
        with no_autocast(q):
            logit = (near @ q_mean[..., None])[..., 0] * q.shape[-1] ** -0.5
        with torch.no_grad():
            size = of_column(mask.kv_layout.sizes.float(), band.column)
            valid = band.valid & (size > 0)  # of an empty cluster the logit is -inf
            rank, cost = logit, size.to(logit.dtype)
            if not band.by_pair:
                rank, cost = logit + size.log(), torch.ones_like(cost)
            soft = _soft_top_k(rank / self.temperature, cost * valid, band.side)
            slope = soft * (1 - soft)  # of the sigmoid
            weight = slope * cost
            weight_sum = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        change = (logit - logit.detach()) / self.temperature
        mean = (weight * change).sum(-1, keepdim=True) / weight_sum
        return slope * (change - mean)

    def _project(self, q_mean: Tensor, k_mean: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_change is None or self.k_change is None:
            return q_mean, k_mean
        with no_autocast(q_mean):
            q_more = q_mean @ self.q_change.to(q_mean.dtype)
            k_more = k_mean @ self.k_change.to(k_mean.dtype)
        return q_mean + q_more, k_mean + k_more


def _soft_top_k(x: Tensor, cost: Tensor, side: int) -> Tensor:
    """Return sigmoid(x + c), c such that a row costs what its first `side` do; 0 where cost is."""
    x = x.masked_fill(cost == 0, -torch.inf)
    wanted = cost[..., :side].sum(-1, keepdim=True)
    finite = x.masked_fill(cost == 0, 0)
    low = -finite.amax(-1, keepdim=True) - 40
    high = -finite.amin(-1, keepdim=True) + 40
    for _ in range(40):
        middle = (low + high) / 2
        too_many = (cost * (x + middle).sigmoid()).sum(-1, keepdim=True) > wanted
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return (x + (low + high) / 2).sigmoid()
