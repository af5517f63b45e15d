"""The gate gradient in plain PyTorch, by padded gathers of a few q blocks at a time."""

import torch
from torch import Tensor

from ..backend import no_autocast
from ..block_pool.op import block_mean
from ..blocks import Blocks

# Elements of the largest intermediate: 16 MiB of fp32 on a CPU, 512 MiB elsewhere.
_MAX_ELEMENTS_CPU = 1 << 22
_MAX_ELEMENTS = 1 << 27
# A block left out by mistake can outweigh all selected ones; e^30 is far, and still finite.
_MAX_LOG_WEIGHT = 30.0


def gate_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    column: Tensor,
    blocks: Blocks,
    centroids: bool,
    column_gate: Tensor | None,
    scale: float,
) -> Tensor:
    """Return d loss / d gate [B, H, Nq, M] for grad = d loss / d out, in fp32 (fp64 for fp64).

    With P_ij = e^(s_ij - lse_i) and D_i = grad_i . out_i it sums over the queries i of the block
    sum_j P_ij (grad_i . v_j - D_i), less the same of the centroid column.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad(), no_autocast(q):
        means = None
        if centroids:
            size = blocks.kv_block_size
            k_mean, v_mean = (block_mean(x, blocks.kv_offsets, size) for x in (k, v))
            log_size = _of_heads(blocks.kv_offsets, q).diff().to(dtype).log()
            if column_gate is not None:
                log_size = log_size + column_gate.to(dtype)[:, None]
            means = k_mean, v_mean, log_size
        delta = (grad.to(dtype) * out.to(dtype)).sum(-1)  # [B, H, Sq]
        kv_size, width, dim = blocks.kv_block_size, column.shape[3], q.shape[3]
        per_row = width * kv_size * max(dim, blocks.q_block_size) * q.shape[0] * q.shape[1]
        limit = _MAX_ELEMENTS_CPU if q.device.type == "cpu" else _MAX_ELEMENTS
        step = max(1, limit // per_row)
        found = []
        for first in range(0, column.shape[2], step):
            rows = slice(first, min(first + step, column.shape[2]))
            found.append(_rows(q, k, v, grad, delta, lse, column, blocks, means, scale, rows))
        return torch.cat(found, 2)


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    column: Tensor,
    blocks: Blocks,
    means: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    rows: slice,
) -> Tensor:
    column = column[:, :, rows]  # [B, H, R, M]
    dtype = delta.dtype
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    query, no_query = _tokens(
        _of_heads(blocks.q_offsets, q)[:, :, rows.start : rows.stop + 1], blocks.q_block_size
    )  # [B, H, R, m]
    at = batch, head, query.clamp(max=q.shape[2] - 1)
    q, grad, lse, delta = q[at].to(dtype), grad[at].to(dtype), lse[at], delta[at]
    lse, delta = lse[:, :, :, None], delta[:, :, :, None]  # [B, H, R, 1, m]
    blind = no_query[:, :, :, None] | (lse == -torch.inf)
    key, no_key = _tokens(_of_heads(blocks.kv_offsets, k), blocks.kv_block_size)
    key, no_key = key[batch, head, column], no_key[batch, head, column]  # [B, H, R, M, n]
    token = batch[..., None], head[..., None], key.clamp(max=k.shape[2] - 1)
    k, v = k[token].to(dtype), v[token].to(dtype)

    def share(logit: Tensor, value: Tensor, shift: Tensor) -> Tensor:
        """Return e^(logit - lse) (value - delta) for [..., m, n], 0 for queries of no block."""
        weight = (logit - shift[..., None]).clamp(max=_MAX_LOG_WEIGHT).exp()
        return (weight * (value - delta[..., None])).masked_fill(blind[..., None], 0)

    q, grad = q[:, :, :, None], grad[:, :, :, None]  # [B, H, R, 1, m, D]
    exact = share(q @ k.transpose(-1, -2) * scale, grad @ v.transpose(-1, -2), lse)
    found = exact.masked_fill(no_key[..., None, :], 0).sum((-1, -2))  # [B, H, R, M]
    if means is None:
        return found
    k_mean, v_mean, log_size = (x[batch, head, column] for x in means)  # [B, H, R, M, D]
    logit = (q @ k_mean[..., None]) * scale + log_size[..., None, None]
    return found - share(logit, grad @ v_mean[..., None], lse).sum((-1, -2))


def _of_heads(offsets: Tensor, x: Tensor) -> Tensor:
    """Return offsets [N + 1] or [B, H, N + 1] as [B, H, N + 1] of x [B, H, S, D]."""
    return offsets.expand(*x.shape[:2], -1)


def _tokens(offsets: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of each block, padded, and which are padding, [B, H, N, block_size]."""
    token = offsets[..., :-1, None].long() + torch.arange(block_size, device=offsets.device)
    return token, token >= offsets[..., 1:, None]
