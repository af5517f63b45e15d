"""Linear attention of each q block over the kv blocks it did not select (SLA, 2509.24006)."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.kernels.blocks import Blocks, block_of_token
from gossamer.sparse.fp32 import no_autocast

# Elements of the [Nq, D, D] sums held at once: 1 GiB of fp32.
_MAX_ELEMENTS = 1 << 28


def linear_complement(q: Tensor, k: Tensor, v: Tensor, left_out: Tensor, blocks: Blocks) -> Tensor:
    """Return phi(q) H / (phi(q) Z) [B, H, Sq, D] in fp32 (fp64 for fp64), phi the softmax over D.

    H_a and Z_a sum phi(k)^T v and phi(k) over the kv blocks with the weight left_out
    [B, H, Nq, Nk], 1 for a block that is left out and 0 for another. A row that leaves out nothing
    has output 0. Differentiable in q, k, v and left_out; no [Sq, Sk]; deterministic. The sums are
    recomputed in backward.
    """
    rows, columns = left_out.shape[2:]
    step = max(1, _MAX_ELEMENTS // (max(rows, columns) * q.shape[-1] ** 2))
    parts = []
    for first in range(0, q.shape[1], step):
        heads = slice(first, first + step)
        of_heads = [x[:, heads] for x in (q, k, v, left_out)]
        of_heads += [
            x.expand(*q.shape[:2], -1)[:, heads] for x in (blocks.q_offsets, blocks.kv_offsets)
        ]
        sizes = blocks.q_block_size, blocks.kv_block_size
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
    sizes: tuple[int, int],
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
        out = phi_q @ total / norm.masked_fill(norm == 0, 1)
    block = block_of_token(q_offsets, q.shape[2])  # [B, H, Sq]
    slot = torch.arange(q.shape[2], device=q.device) - q_offsets.gather(-1, block)
    return _take(out.flatten(2, 3), block * sizes[0] + slot)


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
