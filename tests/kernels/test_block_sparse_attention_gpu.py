"""Block-sparse attention on a GPU: accuracy in every type, determinism, no sync, no recompile."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention

pytestmark = pytest.mark.gpu
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
CLUSTERS = ([0, 1, 130, 5, 300, 70], [130, 0, 5, 1, 300, 33, 3, 64])
_triton = partial(block_sparse_attention, backend="triton")


def _tiles(num_tokens: int, size: int) -> list[int]:
    full, rest = divmod(num_tokens, size)
    return [size] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_triton_is_as_accurate_as_plain_pytorch_at_every_length(
    make_problem: Callable,
    dense_formula: Callable,
    assert_as_accurate: Callable,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    for num_tokens in LENGTHS:
        for q_size, kv_size in ((64, 64), (128, 64)):
            sizes = _tiles(num_tokens, q_size), _tiles(num_tokens, kv_size)
            problem = make_problem(*sizes, batch=2, head_dim=head_dim, dtype=dtype)
            actual, plain = problem.run(_triton, dtype), problem.run(dense_formula, dtype)
            exact = problem.run(dense_formula, torch.float64)
            assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


def test_triton_is_as_accurate_on_blocks_of_any_size(
    make_problem: Callable, dense_formula: Callable, assert_as_accurate: Callable
) -> None:
    generator = torch.Generator().manual_seed(0)
    q_sizes, kv_sizes = (
        torch.randint(0, 129, (9,), generator=generator).tolist() for _ in range(2)
    )
    problem = make_problem(q_sizes, kv_sizes, batch=2, head_dim=64, dtype=torch.bfloat16)
    actual = problem.run(_triton, torch.bfloat16)
    plain = problem.run(dense_formula, torch.bfloat16)
    exact = problem.run(dense_formula, torch.float64)
    assert_as_accurate(actual, plain, exact, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_triton_is_as_accurate_on_clusters(
    make_problem: Callable, assert_as_accurate: Callable, head_dim: int, dtype: torch.dtype
) -> None:
    for attend in (block_sparse_attention, compensated_attention):
        problem = make_problem(*CLUSTERS, batch=2, head_dim=head_dim, dtype=dtype)
        actual = problem.run(partial(attend, backend="triton"), dtype)
        plain, exact = (problem.run(attend, way) for way in (dtype, torch.float64))
        assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.case("N6")
@pytest.mark.parametrize("sizes", [(_tiles(1000, 64),) * 2, CLUSTERS], ids=["tiles", "clusters"])
def test_twenty_backward_runs_give_the_same_bits(
    make_problem: Callable, sizes: tuple[list[int], list[int]]
) -> None:
    problem = make_problem(*sizes, batch=2, heads=4, head_dim=64, dtype=torch.bfloat16)
    first = problem.run(_triton, torch.bfloat16)
    for _ in range(19):
        again = problem.run(_triton, torch.bfloat16)
        assert all(torch.equal(first[name], again[name]) for name in first)


def _compensated(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    # The lists are built anew, and one more pooled mean enters, so that all of it is under test.
    blocks = Blocks.from_selected(
        blocks.selected(),
        blocks.q_offsets,
        blocks.kv_offsets,
        blocks.q_block_size,
        blocks.kv_block_size,
    )
    out, lse = compensated_attention(q, k, v, blocks, backend="triton")
    return out, lse + block_mean(q, blocks.q_offsets, blocks.q_block_size).mean()


@pytest.mark.parametrize("sizes", [(_tiles(1000, 64),) * 2, CLUSTERS], ids=["tiles", "clusters"])
def test_a_step_never_waits_for_the_gpu(
    make_problem: Callable, sizes: tuple[list[int], list[int]]
) -> None:
    problem = make_problem(*sizes, head_dim=64)
    problem.run(_compensated, torch.bfloat16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(_compensated, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_length_or_count_compiles_nothing(make_problem: Callable) -> None:
    from gossamer.kernels.block_sparse_attention import triton as kernels

    def compiled() -> int:
        names = ("fwd", "bwd_dq", "bwd_dkv")
        jits = (getattr(kernels, f"_block_sparse_attention_{name}") for name in names)
        return sum(len(cache[0]) for jit in jits for cache in jit.device_caches.values())

    counts = []
    for num_tokens in (1000, 65, 129, 1999):
        sizes = _tiles(num_tokens, 64)
        problem = make_problem(sizes, sizes, batch=1 + num_tokens % 2, heads=3, head_dim=64)
        problem.run(_triton, torch.bfloat16)
        counts.append(compiled())
    assert len(set(counts)) == 1


def test_a_new_bound_of_the_size_or_number_of_clusters_compiles_nothing(
    make_problem: Callable,
) -> None:
    from gossamer.kernels import ragged
    from gossamer.kernels.block_sparse_attention import triton as kernels

    names = ("fwd", "bwd_dq", "bwd_dkv")
    jits = [getattr(kernels, f"_block_sparse_attention_{name}") for name in names]
    jits.append(ragged._cut)
    counts = []
    for sizes in (CLUSTERS, ([129], [1000]), ([16] * 16, [300, 16, 0]), ([7, 2000], [5] * 40)):
        make_problem(*sizes, heads=2, head_dim=64).run(_triton, torch.bfloat16)
        counts.append(sum(len(cache[0]) for jit in jits for cache in jit.device_caches.values()))
    assert len(set(counts)) == 1


@pytest.mark.case("N13")
@pytest.mark.slow
def test_tensors_of_over_2_to_the_31_elements_are_addressed_right(make_blocks: Callable) -> None:
    heads, num_q, head_dim = 130, 1 << 17, 128
    blocks = make_blocks([128] * (num_q // 128), [128] * 2, heads=heads)
    shapes = ((num_q,), (256,), (256,))
    q, k, v = (
        torch.randn(1, heads, *s, head_dim, device="cuda", dtype=torch.bfloat16) for s in shapes
    )
    assert q.numel() > 2**31
    last = make_blocks(
        [128] * (num_q // 128), [128] * 2, selected=blocks.selected()[:, -1:], heads=1
    )
    results = []
    for part, its_blocks in ((slice(None), blocks), (slice(-1, None), last)):
        leaves = [x[:, part].detach().requires_grad_() for x in (q, k, v)]
        out, _ = _triton(*leaves, its_blocks)
        out.backward(leaves[0].detach())
        results.append([x[:, -1].clone() for x in (out, *(leaf.grad for leaf in leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
