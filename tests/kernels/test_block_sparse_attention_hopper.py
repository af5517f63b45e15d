"""The Hopper kernels, on an H100 or H200: accuracy, padding, determinism, graphs, no recompile."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention, choose_backend
from gossamer.kernels.blocks import Blocks

BF16 = torch.bfloat16


def _why_not() -> str:
    """Return why the Hopper backend cannot run here."""
    try:
        choose_backend(
            "hopper",
            head_dim=128,
            dtype=BF16,
            device="cuda",
            q_block_size=64,
            kv_block_size=64,
            is_uniform=True,
        )
    except ValueError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(_why_not()), reason="needs Hopper"),
]
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
GEOMETRIES = ((64, 64), (128, 64), (128, 128), (64, 128))
_hopper = partial(block_sparse_attention, backend="hopper")


def _tiles(num_tokens: int, size: int) -> list[int]:
    full, rest = divmod(num_tokens, size)
    return [size] * full + [rest] * (rest > 0)


@pytest.fixture
def make_uniform(make_problem: Callable) -> Callable:
    """A problem over uniform blocks whose size stays that of the geometry when one is short."""

    def make(num_q: int, num_kv: int, q_size: int, kv_size: int, **kwargs: object):  # type: ignore[no-untyped-def]
        problem = make_problem(_tiles(num_q, q_size), _tiles(num_kv, kv_size), **kwargs)
        b = problem.blocks
        blocks = Blocks.from_selected(
            b.selected(), b.q_offsets, b.kv_offsets, q_size, kv_size, is_uniform=True
        )
        return type(problem)(
            problem.q, problem.k, problem.v, blocks, problem.grad_out, problem.grad_lse
        )

    return make


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("q_size", "kv_size"), GEOMETRIES)
def test_hopper_is_as_accurate_as_plain_pytorch_at_every_length(
    make_uniform: Callable,
    dense_formula: Callable,
    assert_as_accurate: Callable,
    q_size: int,
    kv_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    for num_tokens in LENGTHS:
        problem = make_uniform(
            num_tokens, num_tokens, q_size, kv_size, batch=2, head_dim=head_dim, dtype=dtype
        )
        actual, plain = problem.run(_hopper, dtype), problem.run(dense_formula, dtype)
        exact = problem.run(dense_formula, torch.float64)
        assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize(("num_q", "num_kv"), [(300, 700), (700, 300), (4097, 4097), (29120, 512)])
@pytest.mark.parametrize(("q_size", "kv_size"), GEOMETRIES)
def test_long_and_unequal_sequences(
    make_uniform: Callable,
    dense_formula: Callable,
    assert_as_accurate: Callable,
    q_size: int,
    kv_size: int,
    num_q: int,
    num_kv: int,
) -> None:
    problem = make_uniform(num_q, num_kv, q_size, kv_size, head_dim=128, dtype=BF16, density=0.2)
    actual, plain = problem.run(_hopper, BF16), problem.run(dense_formula, BF16)
    exact = problem.run(dense_formula, torch.float64)
    assert_as_accurate(actual, plain, exact, torch.finfo(BF16).eps)


def test_29120_tokens_against_the_reference(
    make_uniform: Callable, assert_as_accurate: Callable
) -> None:
    problem = make_uniform(29120, 29120, 128, 64, heads=1, head_dim=128, dtype=BF16, density=0.05)
    # the reference rounds nothing inside: at most twice the error of rounding P and dS to bf16
    reference = problem.run(block_sparse_attention, torch.float64)
    triton = problem.run(partial(block_sparse_attention, backend="triton"), BF16)
    assert_as_accurate(problem.run(_hopper, BF16), triton, reference, torch.finfo(BF16).eps)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_logits_do_not_overflow(make_uniform: Callable, size: float) -> None:
    problem = make_uniform(200, 200, 64, 64, head_dim=128, dtype=BF16)
    problem.q.mul_(size / (128**0.5 * problem.q.abs().max()))
    problem.k.div_(problem.k.abs().max()).mul_(size**0.5)
    results = problem.run(_hopper, BF16)
    finite = problem.run(block_sparse_attention, torch.float64)["lse"].isfinite()
    assert torch.equal(results["lse"].isfinite(), finite)
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")


def test_poison_behind_the_last_token_changes_no_bit(make_uniform: Callable) -> None:
    problem = make_uniform(1000, 1000, 128, 64, head_dim=128, dtype=BF16)
    clean = problem.run(_hopper, BF16)

    def poisoned(x: Tensor) -> Tensor:
        held = x.new_full((*x.shape[:2], 1100, x.shape[3]), float("nan"))
        held[:, :, :1000] = x.detach()
        return held[:, :, :1000]

    leaves = [poisoned(x).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse = _hopper(*leaves, problem.blocks)
    torch.autograd.backward((out, lse), (poisoned(problem.grad_out), problem.grad_lse))
    found = dict(zip(clean, (out, lse, *(x.grad for x in leaves)), strict=True))
    assert all(torch.equal(clean[name], found[name]) for name in clean)


def test_strided_inputs_give_the_same_bits(make_uniform: Callable) -> None:
    problem = make_uniform(300, 300, 64, 64, batch=2, heads=3, head_dim=64, dtype=BF16)
    clean = problem.run(_hopper, BF16)

    def interleaved(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v, grad_out = (
        interleaved(x) for x in (problem.q, problem.k, problem.v, problem.grad_out)
    )
    strided = type(problem)(q, k, v, problem.blocks, grad_out, problem.grad_lse)
    found = strided.run(_hopper, BF16)
    assert all(torch.equal(clean[name], found[name]) for name in clean)


def test_a_hundred_backward_runs_give_the_same_bits(make_uniform: Callable) -> None:
    problem = make_uniform(1000, 1000, 128, 64, batch=2, heads=4, head_dim=128, dtype=BF16)
    first = problem.run(_hopper, BF16)
    for _ in range(99):
        again = problem.run(_hopper, BF16)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_new_length_or_count_compiles_nothing(make_uniform: Callable) -> None:
    from gossamer.kernels.block_sparse_attention import hopper as kernels

    def compiled() -> int:
        names = ("fwd", "bwd_dq", "bwd_dkv")
        jits = [getattr(kernels, f"_block_sparse_attention_{name}") for name in names]
        return sum(len(cache[0]) for jit in jits for cache in jit.device_caches.values())

    counts = []
    for num_tokens in (1000, 65, 129, 1999):
        batch = 1 + num_tokens % 2
        problem = make_uniform(
            num_tokens, num_tokens, 64, 64, batch=batch, heads=3, head_dim=64, dtype=BF16
        )
        problem.run(_hopper, BF16)
        counts.append(compiled())
    assert len(set(counts)) == 1


def test_a_cuda_graph_replays_the_forward(make_uniform: Callable) -> None:
    problem = make_uniform(1000, 1000, 128, 64, head_dim=128, dtype=BF16)
    inputs = [x.clone() for x in (problem.q, problem.k, problem.v)]
    with torch.no_grad():
        _hopper(*inputs, problem.blocks)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _hopper(*inputs, problem.blocks)
        for seed in range(3):
            inputs[0].normal_(generator=torch.Generator("cuda").manual_seed(seed))
            graph.replay()
            fresh = _hopper(*inputs, problem.blocks)
            assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))


def test_the_operator_passes_opcheck_and_compiles(make_uniform: Callable) -> None:
    problem = make_uniform(200, 200, 64, 64, head_dim=64, dtype=BF16)
    tensors = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    arguments = (*tensors, *vars(problem.blocks).values(), 0.125, "hopper")
    torch.library.opcheck(torch.ops.gossamer.block_sparse_attention.default, arguments)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _hopper(q, k, v, problem.blocks)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, problem.grad_out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_tensors_of_over_2_to_the_31_elements_are_addressed_right(make_uniform: Callable) -> None:
    heads, num_q = 130, 1 << 17
    kept = torch.rand(1, heads, num_q // 128, 2, device="cuda") < 0.5
    kept[..., 0] = True
    q = torch.randn(1, heads, num_q, 128, device="cuda", dtype=BF16)
    k, v = (torch.randn(1, heads, 256, 128, device="cuda", dtype=BF16) for _ in range(2))
    assert q.numel() > 2**31
    q_offsets, kv_offsets = (
        torch.arange(0, n + 1, 128, dtype=torch.int32, device="cuda") for n in (num_q, 256)
    )
    results = []
    for part in (slice(None), slice(-1, None)):
        blocks = Blocks.from_selected(
            kept[:, part], q_offsets, kv_offsets, 128, 128, is_uniform=True
        )
        leaves = [x[:, part].detach().requires_grad_() for x in (q, k, v)]
        out, _ = _hopper(*leaves, blocks)
        out.backward(leaves[0].detach())
        results.append([x[:, -1].clone() for x in (out, *(leaf.grad for leaf in leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_auto_takes_hopper_where_it_can() -> None:
    shape = {"head_dim": 128, "device": "cuda", "q_block_size": 128, "kv_block_size": 64}
    assert choose_backend("auto", dtype=BF16, is_uniform=True, **shape) == "hopper"
    assert choose_backend("auto", dtype=BF16, is_uniform=False, **shape) == "triton"
    assert choose_backend("auto", dtype=torch.float32, is_uniform=True, **shape) == "triton"


@pytest.mark.parametrize(("q_size", "kv_size"), GEOMETRIES)
def test_no_tile_is_lost_and_no_stale_memory_is_read(
    make_uniform: Callable, q_size: int, kv_size: int
) -> None:
    """Short lists, many tiles, after a run that fills shared memory with NaN."""
    poison = make_uniform(4097, 4097, q_size, kv_size, heads=4, head_dim=128, dtype=BF16)
    for x in (poison.q, poison.k, poison.v):
        x.fill_(float("nan"))
    for num_q, num_kv in ((29120, 512), (512, 29120)):
        problem = make_uniform(
            num_q, num_kv, q_size, kv_size, head_dim=128, dtype=BF16, density=0.2
        )
        first = problem.run(_hopper, BF16)
        for _ in range(30):
            poison.run(_hopper, BF16)
            for x in first.values():
                torch.full_like(x, float("nan"))  # freed: what is not written comes out as NaN
            again = problem.run(_hopper, BF16)
            assert all(torch.equal(first[name], again[name]) for name in first)
