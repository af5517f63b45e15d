"""The attention modules that a processor calls: sparse, and the dense one beside it."""

import logging
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.kernels.block_sparse_attention.op import backend_for, choose_backend
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.dense_attention.op import dense_attention
from gossamer.sparse.layout import BlockLayout, Layout, TokenGrid, permute_qkv
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid

Backend = Literal["auto", "reference", "triton", "hopper"]

logger = logging.getLogger(__name__)


class MaskEstimator(Protocol):
    """Scores blocks of q, k, v in block order; no gradient, deterministic, no hidden state."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
    ) -> BlockScores: ...


class Compensation(Protocol):
    """Attends exactly to the selected blocks, and in its own way to the others."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str) -> Tensor: ...


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
    """

    def __init__(self, method: SparseMethod, num_heads: int) -> None:
        super().__init__()
        self.layout = _own(method.layout, num_heads)
        self.estimator = method.estimator
        self.policy = _own(method.policy, num_heads)
        self.compensation = _own(method.compensation, num_heads)
        self.backend = method.backend
        self.mask: BlockMask | None = None

    def reset(self) -> None:
        self.mask = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, timestep: Tensor) -> Tensor:
        """Return attention of q, k, v [B, H, S, D] in sequence order; timestep [B]."""
        if self.mask is None:
            q_layout, kv_layout = self.layout(q, k, v, grid)
        else:
            q_layout, kv_layout = self.mask.q_layout, self.mask.kv_layout
        q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
        if self.mask is None:
            with torch.no_grad():
                self.mask = keep_text(self.policy(self.estimator(q, k, v, q_layout, kv_layout)))
        return q_layout.unpermute(self.attend(q, k, v, self.mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """Return attention of q, k, v [B, H, S, D], in block order, under the mask."""
        backend = backend_for(self.backend, q, mask.blocks)
        if not torch.compiler.is_compiling():
            _say(backend, tuple(q.shape[1:]), q.dtype)
        return self.compensation(q, k, v, mask.blocks, backend)


def check_backend(
    method: SparseMethod, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return the backend that the method takes for such tensors in blocks of one size.

    Raises:
        ValueError: if the method names a backend that cannot run them.
    """
    q_block, kv_block = method.layout.block_shape
    return choose_backend(
        method.backend,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        q_block_size=q_block,
        kv_block_size=kv_block,
        is_uniform=True,
    )


def _own(part: Any, num_heads: int) -> Any:
    """Return the layer's own copy of a part with parameters for each head, or the part itself."""
    return deepcopy(part).for_heads(num_heads) if isinstance(part, nn.Module) else part


@cache
def _say(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logger.info("sparse attention of %s %s: backend %s", list(shape), dtype, backend)
