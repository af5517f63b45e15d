"""Block errors in plain PyTorch, block by block: it defines what the kernel must compute."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Tensors of one type, for all heads or for one."""

    q_mean: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    v_mean: Tensor
    center: Tensor


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
    x = Inputs(*(t.to(logits.dtype) for t in (q_mean, k, v, logits, v_mean, center)))
    if offsets.ndim == 1:
        return _blocks(x, offsets.tolist(), of_output, scale)
    heads = [
        _blocks(Inputs(*(t[b, h] for t in x)), each, of_output, scale)
        for b, entry in enumerate(offsets.tolist())
        for h, each in enumerate(entry)
    ]
    error, total = (torch.stack(y).unflatten(0, k.shape[:2]) for y in zip(*heads, strict=True))
    return error, total


def _blocks(x: Inputs, offsets: list[int], of_output: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return both for heads of the same blocks: any leading dimensions, or none."""
    log_error, log_sum = (torch.full_like(x.logits, -torch.inf) for _ in range(2))
    for c, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        values = x.v[..., start:end, :]  # [..., n, D]
        s = x.q_mean @ x.k[..., start:end, :].transpose(-1, -2) * scale  # [..., Nq, n]
        pooled = x.logits[..., c, None]  # [..., Nq, 1]
        peak = torch.maximum(s.amax(-1, keepdim=True), pooled)
        weight, pooled = torch.exp(s - peak), torch.exp(pooled - peak)
        change = weight - pooled
        if of_output:
            # The block's v - mean(v) sum to 0, so that only the change of the weights is left.
            moved = change @ values - change.sum(-1, keepdim=True) * x.center
            error = moved.square().sum(-1)
        else:
            spread = values - x.v_mean[..., c, None, :]
            products = (values.square(), 2 * values * spread, spread.square())
            own, cross, rest = (x.sum(-1)[..., None, :] for x in products)  # [..., 1, n]
            squares = change.square() * own + change * pooled * cross + pooled.square() * rest
            error = squares.clamp(min=0).sum(-1)
        log_error[..., c] = 2 * peak[..., 0] + error.log()
        log_sum[..., c] = peak[..., 0] + weight.sum(-1).log()
    return log_error, log_sum
