"""Block-sparse attention in plain PyTorch: it defines what the kernels must compute.

Everything is fp32 inside (fp64 for fp64 inputs) and rounded once, at the outputs. The Triton
backend also rounds P and dS to the input type before their second dot products.
"""

from itertools import product

import torch
from torch import Tensor

from ..backend import no_autocast
from ..blocks import Blocks, block_of_token
from ..masked_attention import masked_attention

_TILE = 64  # queries, and keys, at a time where little values are skipped


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    bias = torch.where(blocks.selected(), 0.0, float("-inf"))  # [B, H, Nq, Nk]
    q_block = block_of_token(blocks.q_offsets, q.shape[2])
    kv_block = block_of_token(blocks.kv_offsets, k.shape[2])
    return masked_attention(q, k, v, bias, q_block, kv_block, scale)


def filtered(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, skip_below: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [B, H, Sq, D], lse [B, H, Sq] and the share of tiles skipped [B, H]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    selected = blocks.selected()
    heads = q.shape[:2]
    q_offsets = blocks.q_offsets.expand(*heads, -1)
    kv_offsets = blocks.kv_offsets.expand(*heads, -1)
    limit = skip_below.to(dtype).expand(heads[1])
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    skipped = q.new_empty(heads, dtype=torch.float32)
    for at in product(*map(range, heads)):
        q_block, q_tile = _tile_of_token(q_offsets[at], q.shape[2])
        kv_block, kv_tile = _tile_of_token(kv_offsets[at], k.shape[2])
        visible = selected[at][q_block][:, kv_block]  # [Sq, Sk]
        with no_autocast(q):
            logits = q[at].to(dtype) @ k[at].to(dtype).T * scale
        logits = logits.masked_fill(~visible, float("-inf"))
        peak = _tile_max(logits, kv_tile)  # [Sq, tiles]
        gap = (peak - peak.cummax(1).values).nan_to_num(nan=float("-inf"))
        nearest, highest = (_tile_max(x.T, q_tile).T for x in (gap, peak))  # [tiles, tiles]
        skip, meets = nearest < limit[at[1]], highest > float("-inf")
        lse[at] = logits.logsumexp(1)
        prob = (logits - lse[at][:, None]).exp().masked_fill(~visible, 0)
        prob = prob.masked_fill(skip[q_tile][:, kv_tile], 0)
        with no_autocast(q):
            out[at] = (prob @ v[at].to(dtype)).to(q.dtype)
        skipped[at] = (skip & meets).sum() / meets.sum().clamp(min=1)
    return out, lse, skipped


def _tile_of_token(offsets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the block and the tile of each token, counted through all blocks, int64 [S]."""
    block = block_of_token(offsets, num_tokens)
    within = torch.arange(num_tokens, device=offsets.device) - offsets[block]
    return block, (within % _TILE == 0).cumsum(0) - 1


def _tile_max(x: Tensor, tile: Tensor) -> Tensor:
    """Return the maximum of x [R, S] over the tokens of each tile, [R, tiles]."""
    most = x.new_full((x.shape[0], int(tile[-1]) + 1), float("-inf"))
    return most.scatter_reduce_(1, tile.expand_as(x), x, "amax")
