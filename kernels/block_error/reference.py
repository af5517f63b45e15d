"""Block errors in plain PyTorch, block by block: it defines what the kernel must compute."""

import torch
from torch import Tensor


def forward(
    q_mean: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor,
    v_mean: Tensor,
    center: Tensor,
    offsets: Tensor,
    of_output: bool,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return ln error and ln sum of e^s, both [B, H, Nq, Nk]; reads the offsets on the host."""
    tensors = tuple(x.to(logits.dtype) for x in (q_mean, k, v, logits, v_mean, center))
    if offsets.ndim == 1:
        return _blocks(*tensors, offsets.tolist(), of_output, scale)
    heads = [
        _blocks(*(x[b, h] for x in tensors), each, of_output, scale)
        for b, entry in enumerate(offsets.tolist())
        for h, each in enumerate(entry)
    ]
    error, total = (torch.stack(x).unflatten(0, k.shape[:2]) for x in zip(*heads, strict=True))
    return error, total


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor,
    v_mean: Tensor,
    center: Tensor,
    offsets: list[int],
    of_output: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return both for heads of the same blocks: any leading dimensions, or none."""
    log_error, log_sum = torch.full_like(logits, -torch.inf), torch.full_like(logits, -torch.inf)
    for c, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if start == end:
            continue
        values = v[..., start:end, :]  # [..., n, D]
        s = q @ k[..., start:end, :].transpose(-1, -2) * scale  # [..., Nq, n]
        pooled = logits[..., c, None]  # [..., Nq, 1]
        peak = torch.maximum(s.amax(-1, keepdim=True), pooled)
        weight, pooled = torch.exp(s - peak), torch.exp(pooled - peak)
        change = weight - pooled
        if of_output:
            # The block's v - mean(v) sum to 0, so that only the change of the weights is left.
            moved = change @ values - change.sum(-1, keepdim=True) * center
            error = moved.square().sum(-1)
        else:
            spread = values - v_mean[..., c, None, :]
            products = (values.square(), 2 * values * spread, spread.square())
            own, cross, rest = (x.sum(-1)[..., None, :] for x in products)  # [..., 1, n]
            squares = change.square() * own + change * pooled * cross + pooled.square() * rest
            error = squares.clamp(min=0).sum(-1)
        log_error[..., c] = 2 * peak[..., 0] + error.log()
        log_sum[..., c] = peak[..., 0] + weight.sum(-1).log()
    return log_error, log_sum
