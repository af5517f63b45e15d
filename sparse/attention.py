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
from gossamer.sparse.kept import Kept
from gossamer.sparse.layout import BlockLayout, Layout, TokenGrid, permute_qkv
from gossamer.sparse.layouts.clusters import Clusters
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid

Backend = Literal["auto", "reference", "triton", "hopper"]

logger = logging.getLogger(__name__)


class MaskEstimator(Protocol):
    """Scores blocks of q, k, v in block order; no gradient, deterministic, no hidden state.

    It may say what goes with it: `needs_layout`, the class of layout it reads, and `gives`, the
    names of what its scores hold beside the score (BlockScores.given), which some policies need.
    """

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
        self.policy.check_given(getattr(self.estimator, "gives", ()))


class DenseAttention(nn.Module):
    """Full attention with the signature of SparseAttention: teachers and controls use it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, timestep: Tensor) -> Tensor:
        return dense_attention(q, k, v)


class SparseAttention(nn.Module):
    """Block-sparse attention of one layer; owns the layer's mask parameters.

    The mask is computed once per forward of the transformer and kept, so that the recompute of
    gradient checkpointing uses the same one; `reset` (called before each forward) drops it, unless
    a backward is still to come (`Pending`). A step of sampling keeps none.
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
        self.kept: Kept | None = Kept()
        # found once: asking a protocol takes as long as launching several kernels
        self._gated = [p for p in (self.policy, self.estimator) if isinstance(p, Gated)]
        clusters = getattr(self.layout, "clusters", self.layout)
        self.codebooks = Codebooks(clusters) if isinstance(clusters, Clusters) else None

    @property
    def learning(self) -> list[Gated]:
        """Return the parts whose mask parameters train."""
        return [part for part in self._gated if any(p.requires_grad for p in part.parameters())]

    @property
    def mask(self) -> BlockMask | None:
        """Return the mask of this forward, once it is chosen."""
        return None if self.kept is None else self.kept.mask

    @property
    def band(self) -> Band | None:
        """Return the blocks around each row's threshold, where the masks of this forward learn."""
        return None if self.kept is None else self.kept.band

    def reset(
        self, branch: str | None = None, *, is_first: bool = False, is_dense: bool = False
    ) -> None:
        """Drop the mask; the next forward is a step of the guidance branch, or of none."""
        # sampling: at 14B and 720p the masks of all layers take 2.5 GB, and none is asked for again
        is_brief = branch is not None and not (self.training or torch.is_grad_enabled())
        self.kept = Kept(is_dense, is_brief)
        if self.codebooks is not None:
            self.codebooks.start(branch, is_first)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, timestep: Tensor) -> Tensor:
        """Return attention of q, k, v [B, H, S, D] in sequence order; timestep [B]."""
        kept = self.kept
        if kept is None:
            raise ValueError(
                "retain_graph=True: allowed with gradient checkpointing until the model's next "
                "forward, which drops the masks; run the forward again before this backward"
            )
        if kept.is_dense:
            return dense_attention(q, k, v)
        if kept.mask is None:
            with no_autocast(q):
                q_layout, kv_layout = self._group(q, k, v, grid)
        else:
            q_layout, kv_layout = kept.mask.q_layout, kept.mask.kv_layout
        q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
        mask = kept.mask or self._choose(kept, q, k, v, q_layout, kv_layout)
        if kept.is_brief:
            kept.mask = kept.band = None
        gate = self._gate(q, k, kept.band, mask) if torch.is_grad_enabled() else None
        return q_layout.unpermute(self.attend(q, k, v, mask, gate))

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
        self,
        kept: Kept,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_layout: BlockLayout,
        kv_layout: BlockLayout,
    ) -> BlockMask:
        with torch.no_grad(), no_autocast(q):
            scores = self.estimator(q, k, v, q_layout, kv_layout)
            chosen = self.policy(scores)
        # Reentrant checkpointing first runs without gradients: training counts as well.
        if self.learning and (self.training or torch.is_grad_enabled()):
            side = max(part.side for part in self.learning)
            by_pair = not self.policy.counts_blocks
            kept.band = find_band(scores, chosen, side, by_pair=by_pair)
        kept.mask = mask = keep_text(chosen)
        if self.codebooks is not None:
            self.codebooks.observe(scores, mask, v)
        return mask

    def _gate(self, q: Tensor, k: Tensor, band: Band | None, mask: BlockMask) -> Gate | None:
        if band is None:
            return None
        gates = [part.gate(q, k, band, mask) for part in self.learning]
        return Gate(torch.stack(gates).sum(0), band.column)


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
