"""Compensated attention as a PyTorch operator: fakes, torch.compile, activation checkpointing."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.kernels.compensated_attention.op import compensated_attention


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_pass_opcheck(make_problem: Callable, with_bias: bool) -> None:
    problem = make_problem([16, 9], [16, 16])
    compensated_attention(problem.q, problem.k, problem.v, problem.blocks, backend="triton")
    means = (problem.k[:, :, :2].clone(), problem.v[:, :, :2].clone())
    bias = torch.randn(1, 2, 2, 2, device=problem.q.device) if with_bias else None
    inputs = (problem.q, problem.k, problem.v, *means, bias)
    rest = (*vars(problem.blocks).values(), 0.25, "triton")
    ops = torch.ops.gossamer
    leaves = [
        x.clone().requires_grad_(x is not means[0] and x is not means[1]) if x is not None else None
        for x in inputs
    ]
    torch.library.opcheck(ops.compensated_attention.default, (*leaves, *rest))
    saved = ops.compensated_attention(*inputs, *rest)
    gradients = (problem.grad_out, problem.grad_lse)
    torch.library.opcheck(
        ops.compensated_attention_backward.default,
        (*gradients, *inputs, *saved, *rest, with_bias),
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_equals_eager_without_a_graph_break(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 16], [16, 16])
    extras = [torch.randn(1, 2, 2, 2), torch.randn(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        way = "reference" if q.dtype == torch.float64 else backend
        out, lse = compensated_attention(q, k, v, problem.blocks, bias=bias, gate=gate, backend=way)
        return torch.cat([out, lse[..., None]], -1)

    def outputs(attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            x.to(problem.q.device, dtype).requires_grad_()
            for x in (problem.q, problem.k, problem.v, *extras)
        ]
        out = attend(*leaves)
        grad = torch.cat([problem.grad_out, problem.grad_lse[..., None]], -1)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = outputs(attend, torch.float64)
    eager = outputs(attend, torch.float32)
    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for exact, mine, theirs in zip(truth, eager, outputs(traced, torch.float32), strict=True):
        # tracing may choose other roundings, so both are judged against fp64
        assert (theirs - exact).norm() <= 2 * (mine - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_activation_checkpointing_changes_no_bit(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 9], [16, 16])
    attend = partial(compensated_attention, backend=backend)

    def recomputed(*arguments: object) -> tuple[Tensor, Tensor]:
        return checkpoint(attend, *arguments, use_reentrant=False)

    plain, again = (problem.run(f, torch.float32) for f in (attend, recomputed))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
