"""Block-sparse attention: the reference against the dense formula, Triton against fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks

BACKENDS = ("reference", "triton")
SIZES = {
    "full": ([16] * 3, [16] * 4),
    "ragged last block": ([16, 16, 7], [16, 16, 16, 1]),
    "variable": ([16, 5, 0, 12, 1], [9, 16, 0, 3, 16, 13]),
    "not a power of two": ([20, 20, 20], [24, 24]),
}


def _triton(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(q, k, v, blocks, backend="triton")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_reference_equals_the_dense_formula(
    make_problem: Callable, dense_formula: Callable, sizes: tuple[list[int], list[int]]
) -> None:
    problem = make_problem(*sizes, batch=2, heads=3)
    actual = problem.run(block_sparse_attention, torch.float64)
    expected = problem.run(dense_formula, torch.float64)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.case("N7")
def test_reference_equals_the_dense_formula_for_200_random_masks(
    make_problem: Callable, dense_formula: Callable
) -> None:
    problem = make_problem([3, 1, 2], [2, 3, 0, 1], batch=10, heads=20)
    actual = problem.run(block_sparse_attention, torch.float64)
    expected = problem.run(dense_formula, torch.float64)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_computes_half_inputs_in_fp32(
    make_problem: Callable, dense_formula: Callable, dtype: torch.dtype
) -> None:
    problem = make_problem(*SIZES["variable"], dtype=dtype)
    actual = problem.run(block_sparse_attention, dtype)
    exact = problem.run(dense_formula, torch.float64)
    assert actual["out"].dtype == dtype and actual["lse"].dtype == torch.float32
    torch.testing.assert_close(actual["lse"].double(), exact["lse"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual["out"].double(), exact["out"], rtol=2**-8, atol=1e-6)


def test_autocast_does_not_lower_the_precision_of_the_reference(make_problem: Callable) -> None:
    problem = make_problem([16, 16], [16, 16])
    plain = problem.run(block_sparse_attention, torch.float32)
    with torch.autocast(problem.q.device.type, torch.bfloat16):
        cast = problem.run(block_sparse_attention, torch.float32)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.case("N7")
def test_reference_passes_gradcheck_through_out_and_lse(make_problem: Callable) -> None:
    selected = torch.tensor([[True, True, False], [False, True, True]])[None, None]
    problem = make_problem([2, 3], [3, 0, 2], head_dim=3, selected=selected)
    leaves = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    assert torch.autograd.gradcheck(partial(block_sparse_attention, blocks=problem.blocks), leaves)


@pytest.mark.case("N7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_triton_is_as_accurate_as_plain_pytorch(
    make_problem: Callable,
    dense_formula: Callable,
    assert_as_accurate: Callable,
    poisoned_empty: None,
    sizes: tuple[list[int], list[int]],
    dtype: torch.dtype,
) -> None:
    problem = make_problem(*sizes, batch=2, dtype=dtype)
    actual, plain = problem.run(_triton, dtype), problem.run(dense_formula, dtype)
    exact = problem.run(dense_formula, torch.float64)
    assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("head_dim", "sizes"),
    [(32, ([16, 9], [16, 16])), (64, ([128, 70], [128, 128])), (128, ([64, 64], [64, 33]))],
)
def test_triton_is_as_accurate_at_every_head_dim_and_block_size(
    make_problem: Callable,
    dense_formula: Callable,
    assert_as_accurate: Callable,
    head_dim: int,
    sizes: tuple[list[int], list[int]],
) -> None:
    for dtype in (torch.float32, torch.float16):
        problem = make_problem(*sizes, head_dim=head_dim, dtype=dtype)
        actual, plain = problem.run(_triton, dtype), problem.run(dense_formula, dtype)
        exact = problem.run(dense_formula, torch.float64)
        assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_and_an_unselected_column_get_exact_zeros(
    make_problem: Callable, backend: str
) -> None:
    problem = make_problem([16, 16], [16, 16, 16])  # head 0: row 0 empty, column 2 unselected
    results = problem.run(partial(block_sparse_attention, backend=backend), torch.float32)
    assert results["out"][0, 0, :16].eq(0).all() and results["dq"][0, 0, :16].eq(0).all()
    assert results["lse"][0, 0, :16].eq(-torch.inf).all()
    assert results["dk"][0, 0, 32:].eq(0).all() and results["dv"][0, 0, 32:].eq(0).all()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_on_the_lse_alone_has_the_right_gradient(
    make_problem: Callable, dense_formula: Callable, backend: str
) -> None:
    problem = make_problem([16, 4], [16, 7])

    def gradients(attend: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (
            x.to(dtype, copy=True).requires_grad_() for x in (problem.q, problem.k, problem.v)
        )
        lse = attend(q, k, v, problem.blocks)[1]
        return torch.autograd.grad(lse[lse.isfinite()].square().sum(), (q, k))

    actual = gradients(partial(block_sparse_attention, backend=backend), torch.float32)
    for mine, truth in zip(actual, gradients(dense_formula, torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients_change_nothing(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 9], [16, 9], batch=2)
    attend = partial(block_sparse_attention, blocks=problem.blocks, backend=backend)
    packed = torch.stack([problem.q, problem.k, problem.v], 3).transpose(1, 2)  # [B, S, H, 3, D]
    packed = packed.contiguous().requires_grad_()
    out, lse = attend(*packed.transpose(1, 2).unbind(3))
    grad_out = problem.grad_out.transpose(-1, -2).contiguous().transpose(-1, -2)
    grad_lse = problem.grad_lse[:1, :1].expand_as(lse)
    torch.autograd.backward((out, lse), (grad_out, grad_lse))

    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    plain_out, plain_lse = attend(*leaves)
    torch.autograd.backward((plain_out, plain_lse), (problem.grad_out, grad_lse.contiguous()))
    gradient = torch.stack([x.grad for x in leaves], 3).transpose(1, 2)
    pairs = ((out, plain_out), (lse, plain_lse), (packed.grad, gradient))
    for strided, plain in pairs:
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.case("N11")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_the_last_token_changes_no_bit(make_problem: Callable, backend: str) -> None:
    clean = make_problem([16, 9], [16, 3])

    def padded(x: Tensor) -> Tensor:
        buffer = x.new_full((*x.shape[:2], x.shape[2] + 16, *x.shape[3:]), torch.nan)
        return buffer[:, :, : x.shape[2]].copy_(x)

    tensors = (clean.q, clean.k, clean.v, clean.grad_out)
    results = []
    for q, k, v, grad_out in (tensors, map(padded, tensors)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(*leaves, clean.blocks, backend=backend)
        gradients = torch.autograd.grad((out, lse), leaves, (grad_out, padded(clean.grad_lse)))
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.case("N8")
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_mask_equals_dense_attention(make_problem: Callable, backend: str) -> None:
    selected = torch.ones(1, 2, 3, 2, dtype=torch.bool)
    problem = make_problem([32, 32, 5], [32, 30], selected=selected)
    out, _ = block_sparse_attention(
        problem.q, problem.k, problem.v, problem.blocks, backend=backend
    )
    dense = F.scaled_dot_product_attention(problem.q, problem.k, problem.v)
    assert (out - dense).norm() <= 1e-5 * dense.norm()


@pytest.mark.case("N12")
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_and_all_equal_logits_stay_finite(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 16], [16, 16], heads=1)
    for factor in (0.0, 1e4):
        q = (factor * problem.q).requires_grad_()
        out, lse = block_sparse_attention(q, problem.k, problem.v, problem.blocks, backend=backend)
        torch.autograd.backward((out, lse), (problem.grad_out, problem.grad_lse))
        seen = lse.isfinite()
        exact = block_sparse_attention(
            q.double(), problem.k.double(), problem.v.double(), problem.blocks
        )
        torch.testing.assert_close(lse[seen].double(), exact[1][seen], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.double(), exact[0], rtol=1e-3, atol=1e-2)
        assert q.grad.isfinite().all()


# The rows of absent keys overflow on the way; they are never stored.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_lse_far_below_zero_leaves_ragged_blocks_right(
    make_problem: Callable, dense_formula: Callable, backend: str
) -> None:
    problem = make_problem([16, 9], [16, 3])
    problem = replace(problem, q=problem.q / 16 + 8, k=problem.k / 16 - 8)  # logits near -256
    actual = problem.run(partial(block_sparse_attention, backend=backend), torch.float32)
    expected = problem.run(dense_formula, torch.float64)
    for name in expected:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_logits(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16], [16, 16], heads=1)
    default, _ = block_sparse_attention(
        problem.q, problem.k, problem.v, problem.blocks, backend=backend
    )
    scaled, _ = block_sparse_attention(
        problem.q / 3, problem.k, problem.v, problem.blocks, scale=0.75, backend=backend
    )
    torch.testing.assert_close(scaled, default, rtol=1e-5, atol=1e-5)  # 0.75 / 3 = 1 / sqrt(16)
