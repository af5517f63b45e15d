"""Block-sparse attention in plain PyTorch: it defines what the kernels must compute.

Everything is fp32 inside (fp64 for fp64 inputs) and rounded once, at the outputs. The Triton
backend also rounds P and dS to the input type before their second dot products.
"""

import torch
from torch import Tensor

from ..blocks import Blocks, block_of_token
from ..masked_attention import masked_attention


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq]; both are differentiable."""
    bias = torch.where(blocks.selected(), 0.0, float("-inf"))  # [B, H, Nq, Nk]
    q_block = block_of_token(blocks.q_offsets, q.shape[2])
    kv_block = block_of_token(blocks.kv_offsets, k.shape[2])
    return masked_attention(q, k, v, bias, q_block, kv_block, scale)
