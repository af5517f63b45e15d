"""The attention modules that a processor calls: sparse, and the dense one beside it."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.kernels.block_sparse_attention.op import backend_for, choose_backend
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.dense_attention.op import dense_attention
from gossamer.sparse.codebooks import Codebooks
from gossamer.sparse.fp32 import no_autocast
from gossamer.sparse.gates import Band, Gate, Gated, find_band
from gossamer.sparse.layout import BlockLayout, Layout, TokenGrid, permute_qkv
from gossamer.sparse.layouts.clusters import Clusters
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid

Backend = Literal["auto", "reference", "triton", "hopper"]

logger = logging.getLogger(__name__)


class MaskEstimator(Protocol):
    """Scores blocks of q, k, v in block order; no gradient, deterministic, no hidden state."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores:
        """Return scores [B, H, Nq, Nk] of q, k, v [B, H, S, D]."""


class Compensation(Protocol):
    """Attends exactly to the selected blocks, and in its own way to the others."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, gate: Gate | None
    ) -> Tensor:
        """Return attention of q, k, v [B, H, S, D] in block order; `gate` where masks learn."""


@dataclass(frozen=True)
class SparseMethod:
    """One row of the product layout x estimator x policy x compensation."""

    layout: Layout
    estimator: MaskEstimator
    policy: Hybrid
    compensation: Compensation
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        needed = getattr(self.estimator, "needs_layout", None)
        if needed and not isinstance(self.layout, needed):
            raise ValueError(
                f"layout={type(self.layout).__name__}: allowed is {needed.__module__}."
                f"{needed.__name__} with estimator {type(self.estimator).__name__}; set both"
            )


class DenseAttention(nn.Module):
    """Full attention with the signature of SparseAttention: teachers and controls use it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, timestep: Tensor) -> Tensor:
        return dense_attention(q, k, v)


class SparseAttention(nn.Module):
    """Block-sparse attention of one layer; owns the layer's mask parameters.

    The mask is computed once per forward of the transformer and kept, so that the recompute of
    gradient checkpointing uses the same one; `reset` (called before each forward) drops it.
    Clusters go on from the previous step of the same guidance branch, if `reset` names one.
    Parts of the method that hold parameters are copied for the layer. Those that learn get the
    gate gradient of the `band` of blocks around each row's threshold, which is kept likewise.
    """

    def __init__(self, method: SparseMethod, num_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        self.layout = _of_layer(method.layout, num_heads, head_dim)
        self.estimator = _of_layer(method.estimator, num_heads, head_dim)
        self.policy = _of_layer(method.policy, num_heads, head_dim)
        self.compensation = _of_layer(method.compensation, num_heads, head_dim)
        self.backend = method.backend
        self.mask: BlockMask | None = None
        self.band: Band | None = None
        self.is_dense = False  # in this forward
        # found once: asking a protocol takes as long as launching several kernels
        self._gated = [p for p in (self.policy, self.estimator) if isinstance(p, Gated)]
        clusters = getattr(self.layout, "clusters", self.layout)
        self.codebooks = Codebooks(clusters) if isinstance(clusters, Clusters) else None

    @property
    def learning(self) -> list[Gated]:
        """Return the parts whose mask parameters train."""
        return [part for part in self._gated if any(p.requires_grad for p in part.parameters())]

    def reset(
        self, branch: str | None = None, *, is_first: bool = False, is_dense: bool = False
    ) -> None:
        """Drop the mask; the next forward is a step of the guidance branch, or of none."""
        self.mask = self.band = None
        self.is_dense = is_dense
        if self.codebooks is not None:
            self.codebooks.start(branch, is_first)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, timestep: Tensor) -> Tensor:
        """Return attention of q, k, v [B, H, S, D] in sequence order; timestep [B]."""
        if self.is_dense:
            return dense_attention(q, k, v)
        if self.mask is None:
            with no_autocast(q):
                q_layout, kv_layout = self._group(q, k, v, grid)
        else:
            q_layout, kv_layout = self.mask.q_layout, self.mask.kv_layout
        q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
        if self.mask is None:
            self._choose(q, k, v, q_layout, kv_layout)
        assert self.mask is not None
        gate = self._gate(q, k, self.mask) if torch.is_grad_enabled() else None
        return q_layout.unpermute(self.attend(q, k, v, self.mask, gate))

    def _group(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        if isinstance(self.layout, PerHead):
            return self.layout(q, k, v, grid, self.codebooks)
        return (self.codebooks or self.layout)(q, k, v, grid)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, gate: Gate | None = None
    ) -> Tensor:
        """Return attention of q, k, v [B, H, S, D], in block order, under the mask."""
        blocks = mask.blocks
        backend = backend_for(self.backend, q, blocks)
        if not torch.compiler.is_compiling() and not q.is_meta:
            _say(backend, tuple(q.shape[1:]), q.dtype)
        return self.compensation(q, k, v, blocks, backend, gate)

    def _choose(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> None:
        with torch.no_grad(), no_autocast(q):
            scores = self.estimator(q, k, v, q_layout, kv_layout)
            chosen = self.policy(scores)
        # Reentrant checkpointing first runs without gradients: training counts as well.
        if self.learning and (self.training or torch.is_grad_enabled()):
            side = max(part.side for part in self.learning)
            by_pair = not self.policy.counts_blocks
            self.band = find_band(scores, chosen, side, by_pair=by_pair)
        self.mask = keep_text(chosen)
        if self.codebooks is not None:
            self.codebooks.observe(scores, self.mask, v)

    def _gate(self, q: Tensor, k: Tensor, mask: BlockMask) -> Gate | None:
        if self.band is None:
            return None
        gates = [part.gate(q, k, self.band, mask) for part in self.learning]
        return Gate(torch.stack(gates).sum(0), self.band.column)


def check_backend(
    method: SparseMethod, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return the backend that the method takes for such tensors, in the blocks of its layout.

    Raises:
        ValueError: if the method names a backend that cannot run them.
    """
    shape = method.layout.block_shape
    q_block, kv_block = shape or (1, 1)
    return choose_backend(
        method.backend,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        q_block_size=q_block,
        kv_block_size=kv_block,
        is_uniform=shape is not None,
    )


def _of_layer(part: Any, num_heads: int, head_dim: int | None) -> Any:
    """Return the layer's own copy of a part with parameters or buffers, or the part itself."""
    return part.for_heads(num_heads, head_dim) if isinstance(part, nn.Module) else part


@cache
def _say(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logger.info("sparse attention of %s %s: backend %s", list(shape), dtype, backend)
