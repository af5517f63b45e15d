"""Policies turn block scores into a block mask within a budget."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from gossamer.kernels.block_select.op import hybrid_select
from gossamer.sparse.fp32 import Fp32Module
from gossamer.sparse.gates import Band
from gossamer.sparse.mask import BlockMask, BlockScores

# Top-p's slope is the inverse of the score at the threshold; a lower score than this share of
# the mean selected one counts as this, so that no row's slope outweighs all others.
_LEAST_SCORE = 0.1


class Hybrid(Fp32Module):
    """The union of Top-k and Top-p per row (SpargeAttention2, Eq. 9), with one budget per head.

    Both sets are prefixes of one order, so the union is the longer prefix. k is the share of the
    row's blocks, p the score mass to reach; the block that crosses p is kept unless keep_crossing
    is False (SpargeAttention's convention), p >= 1 keeps all, and at least one block a row is kept.
    Ties go to the lower block index. Blocks that the estimator forces are kept beside the budget.
    """

    k: Tensor  # fp32 [H] or [1]
    p: Tensor  # fp32 [H] or [1]
    counts_blocks = True  # k is a share of a row's blocks, kept by score: allocation.coverage holds

    def __init__(
        self, *, k: float = 0.1, p: float = 0.0, keep_crossing: bool = True, num_heads: int = 1
    ) -> None:
        super().__init__()
        self.keep_crossing = keep_crossing
        self.register_buffer("k", _share("k", torch.full((num_heads,), float(k))))
        self.register_buffer("p", _share("p", torch.full((num_heads,), float(p))))

    def check_given(self, given: Collection[str]) -> None:
        """Refuse scores that give too little beside the score: see BlockScores.given."""

    def budget(self) -> tuple[Tensor, Tensor]:
        """Return the present k and p, fp32 [H] or [1]."""
        return self.k, self.p

    def set_budget(self, k: Tensor, p: Tensor) -> None:
        """Set each head's k and p, both [H]."""
        self.k.copy_(_share("k", k))
        self.p.copy_(_share("p", p))

    def forward(self, scores: BlockScores) -> BlockMask:
        k, p = (x.detach() for x in self.budget())
        selected = hybrid_select(scores.score, k, p, keep_crossing=self.keep_crossing)
        if scores.forced is not None:
            selected = selected | scores.forced
        return BlockMask(scores.q_layout, scores.kv_layout, selected)


class TrainedHybrid(Hybrid):
    """Hybrid whose budgets train: each head's k and p get the gate gradient of its blocks.

    `k_shift` and `p_shift` [H] are added to the log-odds of k and p and start at 0, where the
    mask is Hybrid's bit for bit; a budget of 0 or 1 stays what it is. The length r of a row's
    prefix is moved by k where Top-k decides it (dr/dk = Nk) and by p elsewhere (dr/dp = 1 / score
    at the threshold, clipped); d loss / dr is the mean of the gate gradients of the last selected
    and the first unselected block: a central estimate. A row of one block has only the second, a
    row of all blocks only the first.
    """

    side = 1

    def __init__(
        self, *, k: float = 0.1, p: float = 0.0, keep_crossing: bool = True, num_heads: int = 1
    ) -> None:
        super().__init__(k=k, p=p, keep_crossing=keep_crossing, num_heads=num_heads)
        self.k_shift = nn.Parameter(torch.zeros(num_heads))
        self.p_shift = nn.Parameter(torch.zeros(num_heads))

    def budget(self) -> tuple[Tensor, Tensor]:
        """Return the present k and p, fp32 [H], differentiable in their shifts."""
        return _shifted(self.k, self.k_shift), _shifted(self.p, self.p_shift)

    def gate(self, q: Tensor, k: Tensor, band: Band, mask: BlockMask) -> Tensor:
        """Return a gate for each pair of the band, [B, H, Nq, 2 M]; only the nearest two move."""
        return self._gate(band, mask.selected.shape[-1])

    def density_slope(self, band: Band, mask: BlockMask) -> Tensor:
        """Return the slope of each head's density, batch mean, in k_shift and p_shift: [2, H]."""
        with torch.enable_grad():
            gate = self._gate(band, mask.selected.shape[-1])
            density = (gate * band.area).sum() / len(gate)
            return torch.stack(torch.autograd.grad(density, [self.k_shift, self.p_shift]))

    def _gate(self, band: Band, num_blocks: int) -> Tensor:
        k_now, p_now = (x[:, None] for x in self.budget())  # [H, 1]
        top_k = (k_now.detach() * num_blocks).round().clamp(1, num_blocks)
        count = band.count  # [B, H, Nq]
        mean_score = p_now.detach() / count
        per_p = 1 / torch.maximum(band.score[..., 0], _LEAST_SCORE * mean_score)
        length = torch.where(
            count <= top_k,
            num_blocks * (k_now - k_now.detach()),
            per_p.nan_to_num(posinf=0) * (p_now - p_now.detach()),
        )
        last = band.valid[..., 0] & (count > 1)
        first = band.valid[..., band.side]
        share = length / (last.float() + first.float()).clamp(min=1)
        further = share.new_zeros(*count.shape, band.side - 1)
        last_gate, first_gate = ((share * side)[..., None] for side in (last, first))
        return torch.cat([last_gate, further, first_gate, further], -1)


def _shifted(share: Tensor, shift: Tensor) -> Tensor:
    """Multiply the odds of `share` by e^shift; exactly `share` where shift is 0."""
    shifted = share * shift.exp() / (1 + share * shift.expm1())
    return torch.where(share == 1, share, shifted).clamp(max=1)


def _share(field: str, value: Tensor) -> Tensor:
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{field}={value.tolist()}: allowed is a share from 0 to 1; e.g. {field}=0.1"
        )
    return value.float()
