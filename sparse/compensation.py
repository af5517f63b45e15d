"""How the blocks that were not selected enter the output."""

from typing import Self

import torch
from torch import Tensor, nn

from gossamer.kernels.block_gate.op import block_gate
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention
from gossamer.sparse.fp32 import Fp32Module, no_autocast
from gossamer.sparse.gates import Gate
from gossamer.sparse.linear_branch import linear_complement


class Drop:
    """Leave unselected blocks out: the softmax is normalised over the selected keys."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        return _selected(q, k, v, blocks, backend, gate)


class Centroid:
    """Let each unselected block enter as one key at its mean (SVG-EAR, arXiv 2603.08982, 4.1)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        return _compensated(q, k, v, blocks, backend, gate, None)


class GatedCentroid(Fp32Module):
    """Centroid whose weight each head learns: log_gate [H], from 0, is added to the logits."""

    def __init__(self, *, num_heads: int = 1) -> None:
        super().__init__()
        self.log_gate = nn.Parameter(torch.zeros(num_heads))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        log_gate = self.log_gate.to(torch.float64) if q.dtype == torch.float64 else self.log_gate
        return _compensated(q, k, v, blocks, backend, gate, log_gate)


class Linear(Fp32Module):
    """Drop plus a projection of linear attention over the blocks left out (SLA, 2509.24006).

    The feature map is the softmax over the head dim. `projection` [D, D] is shared by the heads
    and starts at 0, where the output is Drop's. As in the paper the branch covers the complement
    only; the authors' released code sums over all tokens and adds a bias.
    """

    of_all_heads = ("projection",)

    def __init__(self) -> None:
        super().__init__()
        self.projection: Tensor | None
        self.register_parameter("projection", None)

    def for_heads(self, num_heads: int, head_dim: int | None = None) -> Self:
        """Return a compensation with its own projection; without a head dim it stays Drop."""
        own = type(self)()
        if head_dim is not None:
            own.projection = nn.Parameter(torch.zeros(head_dim, head_dim))
        return own

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        out = _selected(q, k, v, blocks, backend, gate)
        if self.projection is None:
            return out
        left_out = (~blocks.selected()).float()
        if gate is not None:
            left_out = left_out.scatter_add(-1, gate.column, -gate.value.to(left_out.dtype))
        linear = linear_complement(q, k, v, left_out, blocks)
        with no_autocast(q):
            return out + (linear @ self.projection.to(linear.dtype)).to(out.dtype)


def _selected(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
) -> Tensor:
    out, lse = block_sparse_attention(q, k, v, blocks, backend=backend)
    if gate is None:
        return out
    return block_gate(out, lse, q, k, v, gate.value, gate.column, blocks, centroids=False)


def _compensated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    backend: str,
    gate: Gate | None,
    log_gate: Tensor | None,
) -> Tensor:
    out, lse = compensated_attention(q, k, v, blocks, gate=log_gate, backend=backend)
    if gate is None:
        return out
    return block_gate(
        out,
        lse,
        q,
        k,
        v,
        gate.value,
        gate.column,
        blocks,
        centroids=True,
        column_gate=log_gate,
    )
