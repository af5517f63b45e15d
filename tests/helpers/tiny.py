"""Models small enough for the tests."""

from typing import Any

import torch


def tiny_wan(seed: int = 0, **changes: int) -> Any:
    """Return diffusers' Wan with two layers of two heads, 16 wide, for latents of 4 channels."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32}
    return WanTransformer3DModel(**{**sizes, "rope_max_seq_len": 32, **changes}).eval()
