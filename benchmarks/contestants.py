"""The contestants: dense SDPA, compiled FlexAttention and this package's ops, one entry each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import flex_attention

from gossamer.kernels.block_sparse_attention.op import BACKENDS, block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention
from gossamer.kernels.dense_attention.op import dense_attention
from gossamer.kernels.quantized_attention.op import BACKENDS as QUANTIZED_BACKENDS
from gossamer.kernels.quantized_attention.op import (
    attend_quantized,
    quantize,
    quantized_block_sparse_attention,
)
from gossamer.sparse.mask import BlockMask

Attend = Callable[..., Tensor]


def index_lists(mask: BlockMask, tokens: int) -> Blocks:
    return mask.blocks


def flex_mask(mask: BlockMask, tokens: int) -> FlexMask:
    """Return torch's BlockMask of the same lists: every selected block is a full one."""
    blocks = mask.blocks
    if not blocks.is_uniform:
        raise ValueError("flex takes blocks of one size, not clusters; use rows=uniform")
    return FlexMask.from_kv_blocks(
        torch.zeros_like(blocks.kv_num_blocks),
        torch.zeros_like(blocks.kv_indices),
        blocks.kv_num_blocks,
        blocks.kv_indices,
        BLOCK_SIZE=(blocks.q_block_size, blocks.kv_block_size),
        seq_lengths=(tokens, tokens),
    )


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    `attend` takes q, k, v [B, H, S, D] and what `prepare` made of the mask and returns out; `truth`
    takes Blocks instead and is the plain PyTorch it is checked against. `ready` turns k, v and what
    was prepared into what `attend` takes, before any time is taken.
    """

    name: str
    attend: Attend
    truth: Attend
    prepare: Callable[[BlockMask, int], Any] = index_lists
    is_dense: bool = False
    has_gradient: bool = True
    tolerance: float | None = None  # allowed relative error; None: what the dtype gives
    ready: Callable[[Tensor, Tensor, Any], Any] | None = None

    def arguments(self, mask: BlockMask, leaves: Sequence[Tensor]) -> Any:
        """Return what `attend` takes after q, k, v."""
        _, k, v = leaves
        prepared = self.prepare(mask, k.shape[2])
        return prepared if self.ready is None else self.ready(k.detach(), v.detach(), prepared)


def sparse(backend: str) -> Contestant:
    return Contestant(backend, partial(_sparse, backend=backend), _sparse)


def compensated(backend: str) -> Contestant:
    name = f"{backend}+centroid"
    return Contestant(name, partial(_compensated, backend=backend), _compensated)


def quantized(backend: str, qk: str) -> Contestant:
    attend = partial(_quantized, backend=backend, qk=qk)
    return Contestant(f"{backend}-{qk}", attend, _sparse, has_gradient=False, tolerance=0.1)


def ready_quantized(backend: str, qk: str) -> Contestant:
    """Return the one whose k and v are quantized beforehand, as where they serve several calls."""

    def ready(k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Blocks, Any]:
        return blocks, quantize(k, v, blocks, qk=qk, backend=backend)

    def attend(q: Tensor, k: Tensor, v: Tensor, given: tuple[Blocks, Any]) -> Tensor:
        blocks, quantized = given
        return attend_quantized(q, quantized, blocks, backend=backend)[0]

    return Contestant(
        f"{backend}-{qk}-ready", attend, _sparse, has_gradient=False, tolerance=0.1, ready=ready
    )


def dense(name: str, backend: SDPBackend) -> Contestant:
    return Contestant(name, partial(_dense, backend=backend), _sparse, is_dense=True)


def _sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str = "reference") -> Tensor:
    return block_sparse_attention(q, k, v, blocks, backend=backend)[0]


def _compensated(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str = "reference"
) -> Tensor:
    return compensated_attention(q, k, v, blocks, backend=backend)[0]


def _quantized(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str, qk: str) -> Tensor:
    return quantized_block_sparse_attention(q, k, v, blocks, qk=qk, backend=backend)[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return dense_attention(q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: FlexMask) -> Tensor:
    # The stock forward tile on Hopper has 128 rows; this one is what its autotuning would offer.
    small = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4}
    options = small if mask.BLOCK_SIZE[0] < 128 else None
    return _compiled_flex()(q, k, v, block_mask=mask, kernel_options=options)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Timing one backward many times keeps its graph; a donated buffer could be read only once.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


_OURS = [backend for backend in BACKENDS if backend != "reference"]
_OURS_QUANTIZED = [backend for backend in QUANTIZED_BACKENDS if backend != "reference"]

# Flex comes last: it compiles for long, and a time budget should cut that rather than the others.
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        dense("dense-cudnn", SDPBackend.CUDNN_ATTENTION),
        dense("dense-flash", SDPBackend.FLASH_ATTENTION),
        *(sparse(backend) for backend in _OURS),
        *(compensated(backend) for backend in _OURS),
        *(
            make(backend, qk)
            for make in (quantized, ready_quantized)
            for backend in _OURS_QUANTIZED
            for qk in ("int8", "fp8")
        ),
        Contestant("flex", _flex, _sparse, prepare=flex_mask),
    )
}
