"""Centroid attention, alone and merged with the exact part."""

from collections.abc import Callable
from functools import partial
from math import exp, log

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.centroid_attention.op import centroid_attention
from gossamer.kernels.merge import merge


def _compensated(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    exact = block_sparse_attention(q, k, v, blocks)
    return merge(*exact, *centroid_attention(q, k, v, blocks))


def _by_hand(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, sizes: list[int]) -> Tensor:
    """One query: the exact columns of selected blocks, one column ln n heavier for each other."""
    scale = len(q) ** -0.5
    numerator, denominator = torch.zeros_like(q), 0.0
    for chosen, keys, values in zip(selected.tolist(), k.split(sizes), v.split(sizes), strict=True):
        if chosen:
            columns = list(zip(keys, values, [0.0] * len(keys), strict=True))
        else:
            columns = [(keys.mean(0), values.mean(0), log(len(keys)))] if len(keys) else []
        for key, value, bias in columns:
            weight = exp(scale * float(q @ key) + bias)
            numerator, denominator = numerator + weight * value, denominator + weight
    return torch.cat([numerator / denominator, q.new_tensor([log(denominator)])])


def test_exact_part_merged_with_centroids_equals_the_formula_by_hand(
    make_problem: Callable,
) -> None:
    sizes = [3, 0, 1, 4]
    problem = make_problem([2, 3], sizes, head_dim=4)
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    out, lse = _compensated(q, k, v, problem.blocks)
    selected = problem.blocks.selected()
    for head in range(2):
        for query in range(5):
            row = selected[0, head, int(query >= 2)]
            expected = _by_hand(q[0, head, query], k[0, head], v[0, head], row, sizes)
            actual = torch.cat([out[0, head, query], lse[0, head, query, None]])
            torch.testing.assert_close(actual, expected)


def test_gradients_pass_gradcheck_alone_and_merged(make_problem: Callable) -> None:
    selected = torch.tensor([[True, False, False], [False, True, True]])[None, None]
    problem = make_problem([2, 1], [2, 0, 3], head_dim=3, selected=selected)
    leaves = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    for attend in (centroid_attention, _compensated):
        assert torch.autograd.gradcheck(partial(attend, blocks=problem.blocks), leaves)


def test_a_block_that_selects_everything_has_no_centroid_and_no_gradient(
    make_problem: Callable,
) -> None:
    selected = torch.tensor([[True, True], [True, False]])[None, None]
    problem = make_problem([4, 4], [4, 4], selected=selected)
    results = problem.run(centroid_attention, torch.float32)
    assert results["out"][:, :, :4].eq(0).all() and results["dq"][:, :, :4].eq(0).all()
    assert results["lse"][:, :, :4].eq(-torch.inf).all()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
    assert results["dk"][:, :, :4].eq(0).all() and results["dk"][:, :, 4:].ne(0).any()


def test_blocks_of_one_token_make_compensated_attention_dense(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [1] * 12, head_dim=8)
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    out, _ = _compensated(q, k, v, problem.blocks)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense)


def test_half_inputs_lose_only_the_rounding_of_the_output(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [16, 9, 16], dtype=torch.bfloat16)
    actual = problem.run(centroid_attention, torch.bfloat16)
    exact = problem.run(centroid_attention, torch.float64)
    assert actual["out"].dtype == torch.bfloat16
    torch.testing.assert_close(actual["out"].double(), exact["out"], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(actual["lse"].double(), exact["lse"], rtol=1e-6, atol=1e-6)


def test_autocast_does_not_lower_the_precision(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [8, 8])
    plain = problem.run(centroid_attention, torch.float32)
    with torch.autocast(problem.q.device.type, torch.bfloat16):
        cast = problem.run(centroid_attention, torch.float32)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


def test_an_unknown_backend_is_refused(make_problem: Callable) -> None:
    problem = make_problem([4], [4])
    with pytest.raises(ValueError, match="backend must be 'reference', got 'triton'"):
        centroid_attention(problem.q, problem.k, problem.v, problem.blocks, backend="triton")
