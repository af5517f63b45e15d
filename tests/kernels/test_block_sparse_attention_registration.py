"""The Triton kernels as PyTorch operators: fakes, torch.compile, activation checkpointing."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention


def _arguments(problem, requires_grad: bool) -> tuple[object, ...]:  # type: ignore[no-untyped-def]
    tensors = (x.clone().requires_grad_(requires_grad) for x in (problem.q, problem.k, problem.v))
    return *tensors, *vars(problem.blocks).values(), 0.25, "triton"


def test_the_operators_pass_opcheck(make_problem: Callable) -> None:
    problem = make_problem([16, 9], [16, 16])
    block_sparse_attention(problem.q, problem.k, problem.v, problem.blocks, backend="triton")
    ops = torch.ops.gossamer
    torch.library.opcheck(ops.block_sparse_attention.default, _arguments(problem, True))
    arguments = _arguments(problem, False)
    saved = ops.block_sparse_attention(*arguments)
    gradients = (problem.grad_out, problem.grad_lse)
    torch.library.opcheck(
        ops.block_sparse_attention_backward.default,
        (*gradients, *arguments[:3], *saved, *arguments[3:]),
    )


def test_fakes_keep_the_layout_of_transposed_inputs(make_problem: Callable) -> None:
    problem = make_problem([16, 16], [16], batch=2)
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v)
    )
    out, _ = block_sparse_attention(q, k, v, problem.blocks, backend="triton")
    assert out.stride() == q.stride()
    arguments = (q, k, v, *vars(problem.blocks).values(), 0.25, "triton")
    torch.library.opcheck(
        torch.ops.gossamer.block_sparse_attention.default, arguments, test_utils="test_faketensor"
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_equals_eager_without_a_graph_break(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 16], [16, 16])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        way = "reference" if q.dtype == torch.float64 else backend
        return block_sparse_attention(q, k, v, problem.blocks, backend=way)[0]

    def outputs(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, problem.grad_out.to(dtype))]

    truth = outputs(attend, torch.float64)
    eager = outputs(attend, torch.float32)
    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for exact, mine, theirs in zip(truth, eager, outputs(traced, torch.float32), strict=True):
        # tracing may choose other roundings, so both are judged against fp64
        assert (theirs - exact).norm() <= 2 * (mine - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_activation_checkpointing_changes_no_bit(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 9], [16, 16])
    attend = partial(block_sparse_attention, backend=backend)

    def recomputed(*arguments: object) -> tuple[Tensor, Tensor]:
        return checkpoint(attend, *arguments, use_reentrant=False)

    plain, again = (problem.run(f, torch.float32) for f in (attend, recomputed))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
