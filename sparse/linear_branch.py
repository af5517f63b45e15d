"""Linear attention of each q block over the kv blocks it did not select (SLA, 2509.24006)."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.kernels.blocks import Blocks, block_of_token

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
        tensors = (x[:, heads] for x in (q, k, v, left_out))
        # Nothing here draws random numbers.
        part = checkpoint(_heads, *tensors, blocks, use_reentrant=False, preserve_rng_state=False)
        parts.append(part)
    return torch.cat(parts, 1)


def _heads(q: Tensor, k: Tensor, v: Tensor, left_out: Tensor, blocks: Blocks) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k, v = q.to(dtype).softmax(-1), k.to(dtype).softmax(-1), v.to(dtype)
        left_out = left_out.to(dtype)
        phi_q = _pad(phi_q, blocks.q_offsets, blocks.q_block_size)  # [B, H, Nq, m, D]
        phi_k = _pad(phi_k, blocks.kv_offsets, blocks.kv_block_size)
        v = _pad(v, blocks.kv_offsets, blocks.kv_block_size)
        per_block = (phi_k.transpose(-1, -2) @ v).flatten(-2)  # [B, H, Nk, D * D]
        total = (left_out @ per_block).unflatten(-1, (q.shape[-1], -1))  # [B, H, Nq, D, D]
        norm = phi_q @ (left_out @ phi_k.sum(-2))[..., None]  # [B, H, Nq, m, 1]
        out = phi_q @ total / norm.masked_fill(norm == 0, 1)
    block = block_of_token(blocks.q_offsets, q.shape[2])
    slot = torch.arange(q.shape[2], device=q.device) - blocks.q_offsets[block]
    return out.flatten(2, 3)[:, :, block * blocks.q_block_size + slot]


def _pad(x: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return x [B, H, S, D] as [B, H, N, block_size, D], 0 where a block is shorter."""
    num_blocks = offsets.numel() - 1
    if x.shape[2] == num_blocks * block_size:
        return x.unflatten(2, (num_blocks, block_size))
    token = offsets[:-1, None] + torch.arange(block_size, device=x.device)  # [N, block_size]
    past = (token >= offsets[1:, None])[..., None]
    return x[:, :, token.clamp(max=x.shape[2] - 1)].masked_fill(past, 0)
