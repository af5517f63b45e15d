"""Block scores in plain PyTorch: it defines what the kernel must compute."""

from torch import Tensor


def forward(q_mean: Tensor, k_mean: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    """Return [B, H, Nq, Nk] in fp32."""
    # Subtracting the mean key shifts each row of logits by a constant: only rounding changes.
    centered = k_mean - k_mean.mean(2, keepdim=True)
    logits = q_mean @ centered.transpose(-1, -2) * scale
    return (logits + kv_offsets.diff().log().unsqueeze(-2)).softmax(-1)
