"""True errors of sparse attention, by dense attention: the judge of estimators, and the oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.blocks import block_of_token
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import BlockLayout
from gossamer.sparse.mask import BlockMask, BlockScores


@dataclass(frozen=True)
class Errors:
    """Of one mask, [H] each: squared error of the output over its square, and of the map."""

    output: Tensor
    map: Tensor
    density: Tensor


@torch.no_grad()
def errors_of(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, compensated: bool) -> Errors:
    """Return the errors of a mask on q, k, v [1, H, S, D] in block order."""
    scale = q.shape[-1] ** -0.5
    output, maps = [], []
    for h in range(q.shape[1]):
        row, column = (
            block_of_token(_of_head(x.offsets, h), n.shape[2])
            for x, n in ((mask.q_layout, q), (mask.kv_layout, k))
        )
        allowed = mask.selected[0, h][row][:, column]
        logits = q[0, h] @ k[0, h].T * scale
        filled = torch.full_like(logits, -torch.inf)
        if compensated:
            means = _sum(k[0, h], column, mask.kv_layout.num_blocks, mean=True)
            filled = (q[0, h] @ means.T * scale)[:, column]
        exact = logits.softmax(-1)
        change = torch.where(allowed, logits, filled).softmax(-1) - exact
        out = exact @ v[0, h]
        output.append((change @ v[0, h]).square().sum() / out.square().sum())
        maps.append(change.square().mean())
    return Errors(torch.stack(output).cpu(), torch.stack(maps).cpu(), mask.density[0].cpu())


class TrueErrors:
    """The oracle of compensation: each block's true error if it alone were a centroid."""

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores of q, k, v [1, H, S, D] in block order; error is the mean of a row."""
        heads = [
            _true_errors(q[0, h], k[0, h], v[0, h], _of_head(kv_layout.offsets, h))
            for h in range(q.shape[1])
        ]
        rows = [
            block_of_token(_of_head(q_layout.offsets, h), q.shape[2]) for h in range(len(heads))
        ]
        error = torch.stack(
            [
                _sum(e, row, q_layout.num_blocks, mean=True)
                for e, row in zip(heads, rows, strict=True)
            ]
        )[None]
        total = error.sum(-1, keepdim=True)
        mass = Oracle()(q, k, v, q_layout, kv_layout).score
        score = torch.where(total > 0, error / total.clamp(min=1e-30), mass)
        return BlockScores(q_layout, kv_layout, score, mass=mass, error=total[..., 0])


def _true_errors(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Return |out' - out|^2 [S, Nk] of each query, with one block at a time as a centroid."""
    scale = q.shape[1] ** -0.5
    logits = q @ k.T * scale
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    total, numerator = weight.sum(-1, keepdim=True), weight @ v
    out = numerator / total
    errors = q.new_zeros(len(q), len(offsets) - 1)
    for c, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if end - start < 2:
            continue
        at = slice(start, end)
        pooled = q @ k[at].mean(0)[:, None] * scale - logits.amax(-1, keepdim=True)
        stands = (end - start) * pooled.exp()  # [S, 1]
        top = numerator - weight[:, at] @ v[at] + stands * v[at].mean(0)
        bottom = total - weight[:, at].sum(-1, keepdim=True) + stands
        errors[:, c] = (top / bottom - out).square().sum(-1)
    return errors


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's coefficient along the last dimension; equal values share a rank."""
    x, y = (r - r.mean(-1, keepdim=True) for r in map(_ranks, (a, b)))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def _ranks(x: Tensor) -> Tensor:
    """Return twice the mean rank of the entries that equal each, fp64."""
    x, ordered = x.contiguous(), x.sort(-1)[0]
    first, end = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (first + end).double()


def _of_head(offsets: Tensor, head: int) -> Tensor:
    return offsets if offsets.ndim == 1 else offsets[0, head]


def _sum(x: Tensor, block: Tensor, num_blocks: int, *, mean: bool) -> Tensor:
    member = (block == torch.arange(num_blocks, device=x.device)[:, None]).to(x.dtype)
    return member @ x / (member.sum(1, keepdim=True).clamp(min=1) if mean else 1)
