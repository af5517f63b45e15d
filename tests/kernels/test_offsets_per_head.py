"""Ops with offsets [B, H, N + 1] against the same op on each head alone with offsets [N + 1]."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean, block_mean_pair
from gossamer.kernels.block_score.op import block_score
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks, block_of_token
from gossamer.kernels.compensated_attention.op import compensated_attention
from gossamer.kernels.quantized_attention.op import quantized_block_sparse_attention

BATCH, HEADS, TOKENS, DIM = 2, 2, 40, 16
BLOCKS = 5


def _cuts(generator: torch.Generator) -> Tensor:
    """Random offsets [B, H, N + 1]; some blocks are empty."""
    inner = torch.randint(0, TOKENS + 1, (BATCH, HEADS, BLOCKS - 1), generator=generator)
    ends = [inner.new_full((BATCH, HEADS, 1), end) for end in (0, TOKENS)]
    return torch.cat([ends[0], inner.sort(-1).values, ends[1]], -1).int()


def _record(
    selected: Tensor, q_offsets: Tensor, kv_offsets: Tensor, block_size: int = TOKENS
) -> Blocks:
    return Blocks.from_selected(selected, q_offsets, kv_offsets, block_size, block_size)


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


# A block of at most 40 tokens has a fixed number of tiles; a bound of 200 takes the tables.
@pytest.mark.parametrize("block_size", [TOKENS, 200])
@pytest.mark.parametrize("attend", [block_sparse_attention, compensated_attention])
def test_triton_attends_in_each_heads_own_blocks(
    attend: Callable, block_size: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    q_offsets, kv_offsets = _cuts(generator).to(device), _cuts(generator).to(device)
    selected = (torch.rand(BATCH, HEADS, BLOCKS, BLOCKS, generator=generator) < 0.5).to(device)
    tensors = torch.randn(4, BATCH, HEADS, TOKENS, DIM, generator=generator)
    *leaves, grad = tensors.to(device)
    blocks = _record(selected, q_offsets, kv_offsets, block_size)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        out, lse = attend(*inputs, blocks, backend=backend)
        grads = torch.autograd.grad((out * grad).sum() + lse[lse.isfinite()].sum(), inputs)
        results.append([x.double() for x in (out, lse, *grads)])
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=2e-5)


def test_operators_with_offsets_of_each_head_pass_opcheck_and_compile(device: str) -> None:
    offsets = torch.tensor([[[0, 3, 9]], [[0, 0, 9]]], dtype=torch.int32, device=device)
    selected = torch.tensor([[True, False], [True, True]], device=device).expand(2, 1, 2, 2)
    blocks = _record(selected, offsets, offsets, 200)
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 1, 9, DIM, device=device).unbind()]
    rest = (*vars(blocks).values(), 0.25, "triton")
    means = [x.detach()[:, :, :2].clone() for x in leaves[1:]]
    ops = torch.ops.gossamer
    for attend in (block_sparse_attention, compensated_attention):
        attend(*leaves, blocks, backend="triton")  # defines the operator
    torch.library.opcheck(ops.block_sparse_attention.default, (*leaves, *rest))
    arguments = (*leaves, *means, None, *rest)
    ways = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.compensated_attention.default, arguments, test_utils=ways)

    def eager(*x: Tensor) -> Tensor:
        return block_sparse_attention(*x, blocks, backend="triton")[0]

    traced = torch.compile(eager, fullgraph=True, backend="aot_eager")
    outputs = [function(*leaves) for function in (traced, eager)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_head_is_pooled_and_scored_in_its_own_blocks(device: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    offsets = _cuts(generator).to(device)
    x = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator).to(device).requires_grad_()
    mean = block_mean(x, offsets, TOKENS, backend=backend)
    weight = torch.randn(mean.shape, generator=generator).to(device)
    (grad,) = torch.autograd.grad((mean * weight).sum(), x)
    score = block_score(mean.detach(), mean.detach(), offsets, backend=backend)
    for at in _heads():
        alone = x[at].detach().requires_grad_()
        expected = block_mean(alone, offsets[at][0, 0], TOKENS, backend=backend)
        torch.testing.assert_close(mean[at], expected)
        truth = torch.autograd.grad((expected * weight[at]).sum(), alone)[0]
        torch.testing.assert_close(grad[at], truth)
        means = expected.detach()
        alone_score = block_score(means, means, offsets[at][0, 0], backend=backend)
        torch.testing.assert_close(score[at], alone_score)


def test_a_pair_is_pooled_in_the_blocks_of_each(device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x_offsets, shared = _cuts(generator).to(device), _cuts(generator)[0, 0].to(device)
    x, y = torch.randn(2, BATCH, HEADS, TOKENS, DIM, generator=generator).to(device)
    leaves = [x.requires_grad_(), y.requires_grad_()]
    for offsets in ((x_offsets, shared), (shared, x_offsets)):
        results = []
        for backend in ("triton", "reference"):
            means = block_mean_pair(*leaves, *offsets, 5000, TOKENS, backend=backend)
            grads = torch.autograd.grad(sum(m.square().sum() for m in means), leaves)
            results.append((*means, *grads))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["reference", "triton", "auto"])
def test_quantized_attention_refuses_offsets_of_each_head(backend: str) -> None:
    offsets = _cuts(torch.Generator().manual_seed(6))
    blocks = _record(torch.ones(BATCH, HEADS, BLOCKS, BLOCKS) > 0, offsets, offsets)
    x = torch.randn(BATCH, HEADS, TOKENS, 64).half()
    with pytest.raises(ValueError, match=r"kv_offsets must be \[N \+ 1\], got offsets for each"):
        quantized_block_sparse_attention(x, x, x, blocks, backend=backend)


def test_block_of_token_follows_each_heads_offsets() -> None:
    offsets = _cuts(torch.Generator().manual_seed(2))
    found = block_of_token(offsets, TOKENS)
    for b in range(BATCH):
        for h in range(HEADS):
            sizes = offsets[b, h].diff()
            assert torch.equal(found[b, h], torch.arange(BLOCKS).repeat_interleave(sizes))
