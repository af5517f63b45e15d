"""Ops with offsets [B, H, N + 1] against the same op on each head alone with offsets [N + 1]."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.kernels.block_score.op import block_score
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks, block_of_token
from gossamer.kernels.compensated_attention.op import compensated_attention

BATCH, HEADS, TOKENS, DIM = 2, 3, 40, 16
BLOCKS = 5


def _cuts(generator: torch.Generator) -> Tensor:
    """Random offsets [B, H, N + 1]; some blocks are empty."""
    inner = torch.randint(0, TOKENS + 1, (BATCH, HEADS, BLOCKS - 1), generator=generator)
    ends = [inner.new_full((BATCH, HEADS, 1), end) for end in (0, TOKENS)]
    return torch.cat([ends[0], inner.sort(-1).values, ends[1]], -1).int()


def _record(selected: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Blocks:
    return Blocks.from_selected(selected, q_offsets, kv_offsets, TOKENS, TOKENS)


def _heads() -> list[tuple[slice, slice]]:
    return [(slice(b, b + 1), slice(h, h + 1)) for b in range(BATCH) for h in range(HEADS)]


@pytest.mark.parametrize("attend", [block_sparse_attention, compensated_attention])
def test_each_head_attends_in_its_own_blocks(attend: Callable, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q_offsets, kv_offsets = _cuts(generator).to(device), _cuts(generator).to(device)
    selected = (torch.rand(BATCH, HEADS, BLOCKS, BLOCKS, generator=generator) < 0.5).to(device)
    tensors = torch.randn(4, BATCH, HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    *leaves, grad = tensors.to(device)
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = attend(*leaves, _record(selected, q_offsets, kv_offsets))
    together = (out, lse, *torch.autograd.grad((out * grad).sum(), leaves))
    for at in _heads():
        alone = [x[at].detach().requires_grad_() for x in leaves]
        blocks = _record(selected[at], q_offsets[at][0, 0], kv_offsets[at][0, 0])
        out, lse = attend(*alone, blocks)
        expected = (out, lse, *torch.autograd.grad((out * grad[at]).sum(), alone))
        for actual, truth in zip(together, expected, strict=True):
            torch.testing.assert_close(actual[at], truth)


def test_each_head_is_pooled_and_scored_in_its_own_blocks(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    offsets = _cuts(generator).to(device)
    x = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator).to(device).requires_grad_()
    mean = block_mean(x, offsets, TOKENS, backend="reference")
    weight = torch.randn(mean.shape, generator=generator).to(device)
    (grad,) = torch.autograd.grad((mean * weight).sum(), x)
    score = block_score(mean.detach(), mean.detach(), offsets, backend="reference")
    for at in _heads():
        alone = x[at].detach().requires_grad_()
        expected = block_mean(alone, offsets[at][0, 0], TOKENS, backend="reference")
        torch.testing.assert_close(mean[at], expected)
        truth = torch.autograd.grad((expected * weight[at]).sum(), alone)[0]
        torch.testing.assert_close(grad[at], truth)
        means = expected.detach()
        alone_score = block_score(means, means, offsets[at][0, 0], backend="reference")
        torch.testing.assert_close(score[at], alone_score)


def test_block_of_token_follows_each_heads_offsets() -> None:
    offsets = _cuts(torch.Generator().manual_seed(2))
    found = block_of_token(offsets, TOKENS)
    for b in range(BATCH):
        for h in range(HEADS):
            sizes = offsets[b, h].diff()
            assert torch.equal(found[b, h], torch.arange(BLOCKS).repeat_interleave(sizes))
