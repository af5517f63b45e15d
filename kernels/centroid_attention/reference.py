"""Centroid attention in plain PyTorch, on any device.

Means, logits [B, H, Sq, Nk] and softmax are fp32 (fp64 for fp64 inputs), so that large blocks lose
nothing; only the outputs are rounded.
"""

import torch
from torch import Tensor

from ..block_pool.op import block_mean
from ..blocks import Blocks, block_of_token
from ..masked_attention import masked_attention


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    k_mean, v_mean = (
        block_mean(x, blocks.kv_offsets, blocks.kv_block_size) for x in (k, v)
    )  # [B, H, Nk, D]
    log_size = blocks.kv_offsets.diff().to(k_mean.dtype).log()  # -inf hides an empty block
    bias = torch.where(blocks.selected(), float("-inf"), log_size)  # [B, H, Nq, Nk]
    q_block = block_of_token(blocks.q_offsets, q.shape[2])
    column = torch.arange(log_size.numel(), device=q.device)
    return masked_attention(q, k_mean, v_mean, bias, q_block, column, scale)
