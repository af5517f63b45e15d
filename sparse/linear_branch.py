"""Linear attention of each q block over the kv blocks it did not select (SLA, 2509.24006)."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from gossamer.kernels.blocks import Blocks, block_of_token
from gossamer.sparse.fp32 import no_autocast

# Elements of the [Nq, D, D] sums held at once: 1 GiB of fp32.
_MAX_ELEMENTS = 1 << 28
# Of features that do not meet; far lower, the gradient of the quotient overflows.
_LEAST_NORM = 1e-20
# Padded tokens for each token, at most; else blocks are cut into pieces of so many tokens. Clusters
# give a loose bound of their size: all tokens.
_MAX_PADDING, _PIECE = 4, 64


def linear_complement(q: Tensor, k: Tensor, v: Tensor, left_out: Tensor, blocks: Blocks) -> Tensor:
    """Return phi(q) H / (phi(q) Z) [B, H, Sq, D] in fp32 (fp64 for fp64), phi the softmax over D.

    H_a and Z_a sum phi(k)^T v and phi(k) over the kv blocks with the weight left_out
    [B, H, Nq, Nk], 1 for a block that is left out and 0 for another. A row that leaves out nothing
    has output 0. Differentiable in q, k, v and left_out; no [Sq, Sk]; deterministic. The sums are
    recomputed in backward.
    """
    offsets = [x.expand(*q.shape[:2], -1) for x in (blocks.q_offsets, blocks.kv_offsets)]
    sizes = [blocks.q_block_size, blocks.kv_block_size]
    for side, tokens in enumerate((q.shape[2], k.shape[2])):
        if left_out.shape[2 + side] * sizes[side] > _MAX_PADDING * tokens:
            offsets[side], of_block = _cut(offsets[side], tokens)
            sizes[side], of_block = _PIECE, of_block.to(left_out.dtype)
            with no_autocast(q):  # products, whose gradient is deterministic
                left_out = left_out @ of_block.mT if side else of_block @ left_out
    step = max(1, _MAX_ELEMENTS // (len(q) * max(left_out.shape[2:]) * q.shape[3] ** 2))
    parts = []
    for first in range(0, q.shape[1], step):
        heads = slice(first, first + step)
        of_heads = [x[:, heads] for x in (q, k, v, left_out, *offsets)]
        # Nothing here draws random numbers.
        part = checkpoint(_heads, *of_heads, sizes, use_reentrant=False, preserve_rng_state=False)
        parts.append(part)
    return torch.cat(parts, 1)


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left_out: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    sizes: list[int],
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with no_autocast(q):
        phi_q, phi_k, v = q.to(dtype).softmax(-1), k.to(dtype).softmax(-1), v.to(dtype)
        left_out = left_out.to(dtype)
        phi_q = _pad(phi_q, q_offsets, sizes[0])  # [B, H, Nq, m, D]
        phi_k = _pad(phi_k, kv_offsets, sizes[1])
        v = _pad(v, kv_offsets, sizes[1])
        per_block = (phi_k.transpose(-1, -2) @ v).flatten(-2)  # [B, H, Nk, D * D]
        total = (left_out @ per_block).unflatten(-1, (q.shape[-1], -1))  # [B, H, Nq, D, D]
        norm = phi_q @ (left_out @ phi_k.sum(-2))[..., None]  # [B, H, Nq, m, 1]
        out = phi_q @ total / norm.masked_fill(norm == 0, 1).clamp(min=_LEAST_NORM)
    block = block_of_token(q_offsets, q.shape[2])  # [B, H, Sq]
    slot = torch.arange(q.shape[2], device=q.device) - q_offsets.gather(-1, block)
    return _take(out.flatten(2, 3), block * sizes[0] + slot)


def _cut(offsets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cut blocks, offsets [B, H, N + 1], into T pieces, as many as there could be; no sync.

    Return their offsets [B, H, T + 1] and whose piece each is, bool [B, H, T, N].
    """
    count = (offsets.diff() + _PIECE - 1) // _PIECE
    end = count.cumsum(-1)
    piece = torch.arange(count.shape[-1] + num_tokens // _PIECE, device=offsets.device)
    piece = piece.expand(*offsets.shape[:2], -1).contiguous()
    block = torch.searchsorted(end, piece, right=True).clamp(max=count.shape[-1] - 1)
    start = offsets.gather(-1, block) + (piece - (end - count).gather(-1, block)) * _PIECE
    of_block = block[..., None] == torch.arange(count.shape[-1], device=offsets.device)
    return pad(start.clamp(max=num_tokens), (0, 1), value=num_tokens), of_block


def _pad(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return x [B, H, S, D] as [B, H, N, block_size, D], 0 where a block is shorter."""
    num_blocks = offsets.shape[-1] - 1
    token = offsets[..., :-1, None] + torch.arange(block_size, device=x.device)
    past = (token >= offsets[..., 1:, None])[..., None]
    padded = _take(x, token.clamp(max=x.shape[2] - 1).flatten(2).long())
    return padded.unflatten(2, (num_blocks, block_size)).masked_fill(past, 0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens index [B, H, T] of x [B, H, S, D]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
