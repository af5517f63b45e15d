"""Compensated attention in plain PyTorch, on any device: the exact part merged with the centroids.

Means, logits [B, H, Sq, Nk] and softmax are fp32 (fp64 for fp64 inputs), so that large blocks lose
nothing; each part rounds its outputs, and so does the merge.
"""

import torch
from torch import Tensor

from ..block_pool.op import block_mean
from ..block_sparse_attention.op import block_sparse_attention
from ..blocks import Blocks, block_of_token
from ..masked_attention import masked_attention
from ..merge import merge


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    exact = block_sparse_attention(q, k, v, blocks, scale=scale)
    return merge(*exact, *_centroids(q, k, v, bias, blocks, scale))


def _centroids(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    k_mean, v_mean = (
        block_mean(x, blocks.kv_offsets, blocks.kv_block_size, backend="reference") for x in (k, v)
    )  # [B, H, Nk, D]
    logit = blocks.kv_offsets.diff().to(k_mean.dtype).log()  # -inf hides an empty block
    logit = logit.unsqueeze(-2)
    if bias is not None:
        logit = logit + bias
    logit = torch.where(blocks.selected(), float("-inf"), logit)  # [B, H, Nq, Nk]
    q_block = block_of_token(blocks.q_offsets, q.shape[2])
    column = torch.arange(logit.shape[3], device=q.device)
    return masked_attention(q, k_mean, v_mean, logit, q_block, column, scale)
