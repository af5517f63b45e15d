"""Blocks of any size, up to all tokens: the tables against a loop, Triton against fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gossamer.kernels import ragged
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention

CLUSTERS = ([0, 1, 130, 5, 40], [130, 0, 5, 1, 16, 3])
OPS = {"exact": block_sparse_attention, "compensated": compensated_attention}
both_ops = pytest.mark.parametrize("attend", OPS.values(), ids=OPS)


def _triton(attend: Callable) -> Callable:
    return partial(attend, backend="triton")


def _cut(size: int, start: int, piece: int) -> list[tuple[int, int]]:
    """Return first token and length of the pieces of one block."""
    return [(start + at, min(piece, size - at)) for at in range(0, size, piece)]


def _cuts(shape: tuple[int, ...], num_tokens: int, generator: torch.Generator) -> Tensor:
    """Random offsets [*shape]; some blocks are empty."""
    inner = torch.randint(0, num_tokens + 1, (*shape[:-1], shape[-1] - 2), generator=generator)
    ends = [inner.new_full((*shape[:-1], 1), end) for end in (0, num_tokens)]
    return torch.cat([ends[0], inner.sort(-1).values, ends[1]], -1).int()


@pytest.mark.parametrize("num_tokens", [1, 40, 700])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_tables_hold_every_token_of_every_list_once(
    device: str, num_tokens: int, per_head: bool
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    heads = (2, 3) if per_head else ()
    own, other = (_cuts((*heads, n), num_tokens, generator).to(device) for n in (5, 71))
    selected = (torch.rand(2, 3, 4, 70, generator=generator) < 0.7).to(device)
    selected[0, 0, 1] = False
    blocks = Blocks.from_selected(selected, own, other, num_tokens, num_tokens)
    rows, step, group = 16, 32, 8
    made = ragged.tables(
        blocks.kv_num_blocks, blocks.kv_indices, own, other, num_tokens, num_tokens,
        rows, step, group,
    )  # fmt: skip
    for b in range(2):
        for h in range(3):
            cuts = [x[b, h] if per_head else x for x in (own, other)]
            expected = [
                block << 32 | start
                for block in range(4)
                for start, _ in _cut(int(cuts[0].diff()[block]), int(cuts[0][block]), rows)
            ]
            tiles = made.tiles[b, h].tolist()
            assert tiles[: len(expected)] == expected
            assert set(tiles[len(expected) :]) <= {-1}
            for row in range(4):
                groups = [
                    start << 5 | length
                    for block in selected[b, h, row].nonzero().flatten().tolist()
                    for start, length in _cut(
                        int(cuts[1].diff()[block]), int(cuts[1][block]), group
                    )
                ]
                count = int(made.counts[b, h, row])
                assert count == -(-len(groups) // (step // group))
                found = made.slots[b, h, row, : count * (step // group)].tolist()
                assert found == groups + [0] * (len(found) - len(groups))
    used = ragged.tile_map(own, torch.Size((2, 3)), num_tokens, rows)
    assert torch.equal(used.tiles, made.tiles)
    assert torch.equal(used.used.long(), (made.tiles >= 0).sum(-1))


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_is_as_accurate_on_clusters_as_the_reference(
    make_problem: Callable,
    assert_as_accurate: Callable,
    poisoned_empty: None,
    attend: Callable,
    dtype: torch.dtype,
) -> None:
    problem = make_problem(*CLUSTERS, dtype=dtype)
    actual, plain = problem.run(_triton(attend), dtype), problem.run(attend, dtype)
    assert_as_accurate(actual, plain, problem.run(attend, torch.float64), torch.finfo(dtype).eps)


def test_one_large_block_against_many_small_ones(
    make_problem: Callable, assert_as_accurate: Callable
) -> None:
    for sizes in (([140], [3] * 15), ([2] * 6, [140, 1])):
        problem = make_problem(*sizes, heads=1, selected=torch.ones(1, 1, *map(len, sizes)) > 0)
        actual = problem.run(_triton(block_sparse_attention), torch.float32)
        plain = problem.run(block_sparse_attention, torch.float32)
        exact = problem.run(block_sparse_attention, torch.float64)
        assert_as_accurate(actual, plain, exact, 2**-23)


@both_ops
def test_a_looser_bound_of_the_size_changes_no_bit(
    make_problem: Callable, attend: Callable
) -> None:
    problem = make_problem(*CLUSTERS)
    blocks = replace(problem.blocks, q_block_size=176, kv_block_size=155)
    loose = replace(problem, blocks=blocks)
    run = _triton(block_sparse_attention)
    tight, same = (p.run(run, torch.float32) for p in (problem, loose))
    assert all(torch.equal(tight[name], same[name]) for name in tight)


def test_an_empty_row_and_an_unselected_column_get_exact_zeros(make_problem: Callable) -> None:
    problem = make_problem([140, 16], [16, 130, 9])  # head 0: row 0 empty, column 2 unselected
    results = problem.run(_triton(block_sparse_attention), torch.float32)
    assert results["out"][0, 0, :140].eq(0).all() and results["dq"][0, 0, :140].eq(0).all()
    assert results["lse"][0, 0, :140].eq(-torch.inf).all()
    assert results["dk"][0, 0, 146:].eq(0).all() and results["dv"][0, 0, 146:].eq(0).all()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


@both_ops
def test_nan_behind_the_last_token_changes_no_bit(make_problem: Callable, attend: Callable) -> None:
    clean = make_problem([130, 9], [3, 16, 131])

    def padded(x: Tensor) -> Tensor:
        buffer = x.new_full((*x.shape[:2], x.shape[2] + 64, *x.shape[3:]), torch.nan)
        return buffer[:, :, : x.shape[2]].copy_(x)

    tensors = (clean.q, clean.k, clean.v, clean.grad_out)
    results = []
    for q, k, v, grad_out in (tensors, map(padded, tensors)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, clean.blocks, backend="triton")
        gradients = torch.autograd.grad((out, lse), leaves, (grad_out, padded(clean.grad_lse)))
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_heads_that_share_one_table_change_no_bit(
    make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem([130, 5], [3, 16, 131], batch=2)
    run = partial(problem.run, _triton(block_sparse_attention), torch.float32)
    at_once = run()
    launched = []
    of_heads = ragged.of_heads
    path = "gossamer.kernels.block_sparse_attention.triton.of_heads"
    monkeypatch.setattr(path, lambda blocks, at: launched.append(at) or of_heads(blocks, at))
    monkeypatch.setattr(ragged, "_MAX_SLOTS", 1)
    in_turn = run()
    assert len(launched) == 2 * 2 * 3  # each head of forward, dQ and dK/dV
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


def test_few_programs_give_the_gradients_of_many(
    make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.kernels.compensated_attention import triton

    problem = make_problem([130, 0, 17], [16, 0, 5], heads=1)
    run = partial(problem.run, _triton(compensated_attention), torch.float32)
    many = run()
    monkeypatch.setattr(triton, "_NUM_PROGRAMS", 7)
    torch.testing.assert_close(run(), many)


def test_the_gradient_of_the_bias_sums_all_tiles_of_a_block(make_problem: Callable) -> None:
    problem = make_problem(*CLUSTERS, dtype=torch.float16)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(problem.blocks.kv_indices.shape, generator=generator).to(problem.q.device)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = bias.to(dtype, copy=True).requires_grad_()
        problem.run(partial(compensated_attention, bias=leaf, backend=backend), dtype)
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert grads[1].abs().max() > 0.1
