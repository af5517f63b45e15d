"""Proposition 1 of SVG-EAR (arXiv 2603.08982): a bound of the attention map's error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.kernels.blocks import block_of_token
from gossamer.sparse.mask import BlockMask


@dataclass(frozen=True)
class MapError:
    """Mean squared error of a compensated attention map and its bound, fp64 [B, H] each."""

    error: Tensor  # of the map, measured
    probe: Tensor  # the bound's first term: what the mean queries see of the unselected blocks
    spread: Tensor  # the second: how far queries lie from their mean

    @property
    def bound(self) -> Tensor:
        return self.probe + self.spread


@torch.no_grad()
def map_error(q: Tensor, k: Tensor, mask: BlockMask, *, q_blocks: int | None = None) -> MapError:
    """Return the error of the map of q, k [B, H, S, D] in block order, and Proposition 1's bound.

    The map has each key of an unselected block at the block's mean. The bound holds for masks that
    leave the softmax's normaliser about as it was, and says nothing of the values: a diagnostic,
    in fp64 and one S x S matrix a head; with `q_blocks` the rows of up to so many blocks, spread
    over the tokens, stand for all.
    """
    q_offsets, kv_offsets = (
        x.offsets.expand(*q.shape[:2], -1) for x in (mask.q_layout, mask.kv_layout)
    )
    terms = [
        _of_head(q[b, h].double(), k[b, h].double(), q_offsets[b, h], kv_offsets[b, h],
                 mask.selected[b, h], q_blocks)
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]  # fmt: skip
    return MapError(*torch.stack(terms).unflatten(0, q.shape[:2]).unbind(-1))


def _of_head(
    q: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    selected: Tensor,
    q_blocks: int | None,
) -> Tensor:
    scale = q.shape[1] ** -0.5
    row, column = block_of_token(q_offsets, len(q)), block_of_token(kv_offsets, len(k))
    mean_q, mean_k = (
        block_mean(x[None, None], offsets, len(x))[0, 0, block]  # of each token's block
        for x, offsets, block in ((q, q_offsets, row), (k, kv_offsets, column))
    )
    if q_blocks is not None:
        place = (torch.arange(q_blocks, device=q.device) + 0.5) * (len(q) / q_blocks)
        looked_at = torch.isin(row, row[place.long()]).nonzero()[:, 0]
        q, row, mean_q = (x[looked_at] for x in (q, row, mean_q))
    is_open = ~selected[row][:, column]
    logits = q @ k.T * scale
    lse = logits.logsumexp(-1, keepdim=True)
    filled = torch.where(is_open, q @ mean_k.T * scale, logits)
    error = (filled.softmax(-1) - logits.softmax(-1)).square().mean()
    # Divided by the normaliser before the exponential: no overflow.
    seen = (mean_q @ mean_k.T * scale - lse).exp() - (mean_q @ k.T * scale - lse).exp()
    probe = 2 * (seen.square() * is_open).mean()
    distance = (q - mean_q).square().sum(1).mean()
    spread = 8 * distance * k.square().sum(1).amax() / (len(k) * q.shape[1])
    return torch.stack([error, probe, spread])
