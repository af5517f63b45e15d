"""Budgets in token pairs, for blocks of unequal size: a share of blocks is no share of the work."""

import torch
from torch import Tensor

from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid


class TokenHybrid(Hybrid):
    """Hybrid whose k is the share of a head's query-key token pairs, whatever the block sizes.

    Blocks go by score over tokens, what a pair of tokens is worth; where blocks are equal that is
    Hybrid's order. Each row keeps the prefix that ends nearest to k of the keys, or that reaches p;
    the rounding of rows is evened out within the head, whose density is k to half a pair of
    blocks. One block a row is always kept.
    """

    counts_blocks = False

    def forward(self, scores: BlockScores) -> BlockMask:
        k, p = (x.detach() for x in self.budget())
        layouts = scores.q_layout, scores.kv_layout
        selected = token_prefix(scores.score, *layouts, k, p, keep_crossing=self.keep_crossing)
        if scores.forced is not None:
            selected = selected | scores.forced
        return BlockMask(*layouts, selected)


def token_prefix(
    score: Tensor,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    share: Tensor,
    p: Tensor | None = None,
    *,
    keep_crossing: bool = True,
) -> Tensor:
    """Return bool [B, H, Nq, Nk]: a prefix of each row by score over tokens.

    Together the rows of a head keep `share` [H] of its token pairs: blocks of all rows are taken
    in the order in which the middle of the block lies along its row's keys, until the next would
    bring the head's pairs further from the share. With p [H], rows go on until their score
    reaches it. Nested as share and p grow; no sync, deterministic.
    """
    q_size = q_layout.sizes[..., :, None]
    kv_size = kv_layout.sizes[..., None, :].expand(score.shape)
    order = (score / kv_size.clamp(min=1)).argsort(dim=-1, descending=True, stable=True)
    size = kv_size.gather(-1, order)
    middle = 2 * size.cumsum(-1) - size  # in half tokens
    middle[..., 0] = -1  # one block a row comes first
    area = (size * q_size).expand_as(size).flatten(2)
    turn = middle.flatten(2).argsort(dim=-1, stable=True)
    ordered = area.gather(-1, turn)
    end = 2 * ordered.cumsum(-1) - ordered
    budget = 2 * share.double()[:, None] * area.sum(-1, keepdim=True)
    kept = torch.zeros_like(area, dtype=torch.bool).scatter_(-1, turn, end <= budget)
    kept = kept.view_as(size)
    kept[..., 0] = True
    if p is not None:
        p = p[:, None, None]
        mass = score.gather(-1, order)
        reached = mass.cumsum(-1)
        in_top_p = reached - mass < p
        if not keep_crossing:
            in_top_p &= reached <= p
        kept |= in_top_p | (p >= 1)
    return torch.zeros_like(kept).scatter_(-1, order, kept)
