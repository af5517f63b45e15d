"""Compensated attention: the reference against one softmax written out, Triton against fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention

SIZES = {
    "full": ([16] * 3, [16] * 4),
    "ragged last block": ([16, 16, 7], [16, 16, 16, 1]),
    "variable": ([16, 5, 0, 12, 1], [9, 16, 0, 3, 16, 13]),
    "not a power of two": ([20, 20, 20], [24, 24]),
    "one block": ([9], [13]),
    "two tiles a block and a row": ([64, 40], [1] * 33),
}
EXTRAS = {"plain": (), "bias": ("bias",), "gate": ("gate",), "both": ("bias", "gate")}
_triton = partial(compensated_attention, backend="triton")


def _means(x: Tensor, blocks: Blocks) -> Tensor:
    parts = x.split(blocks.kv_offsets.diff().tolist(), 2)
    return torch.stack([part.sum(2) / max(1, part.shape[2]) for part in parts], 2)


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over all tokens and all centroids, in the inputs' own type."""
    rows, sizes = blocks.q_offsets.diff(), blocks.kv_offsets.diff()
    selected = blocks.selected().repeat_interleave(rows, 2)  # [B, H, Sq, Nk]
    token = torch.zeros_like(selected, dtype=q.dtype).masked_fill(~selected, -torch.inf)
    centroid = sizes.to(q.dtype).log().expand(selected.shape).masked_fill(selected, -torch.inf)
    if bias is not None:
        centroid = centroid + bias.to(q.dtype).repeat_interleave(rows, 2)
    if gate is not None:
        centroid = centroid + gate.to(q.dtype)[:, None, None]
    key, value = (torch.cat([x, _means(x, blocks)], 2) for x in (k, v))
    logits = q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits + torch.cat([token.repeat_interleave(sizes, 3), centroid], 3)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def _run(
    problem, attend: Callable, dtype: torch.dtype, names: tuple[str, ...] = ()
) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Return out, lse and the gradients, also of a random bias and gate if named."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"bias": problem.blocks.kv_indices.shape, "gate": problem.q.shape[1:2]}
    wide = dtype if dtype == torch.float64 else torch.float32
    extras = {
        name: torch.randn(shapes[name], generator=generator).to(problem.q.device, wide)
        for name in names
    }
    for x in extras.values():
        x.requires_grad_()
    results = problem.run(partial(attend, **extras), dtype)
    return results | {f"d{name}": x.grad for name, x in extras.items()}


@pytest.mark.parametrize("names", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_reference_equals_one_softmax_over_tokens_and_centroids(
    make_problem: Callable, sizes: tuple[list[int], list[int]], names: tuple[str, ...]
) -> None:
    problem = make_problem(*sizes, batch=2, heads=3)
    actual = _run(problem, compensated_attention, torch.float64, names)
    expected = _run(problem, _formula, torch.float64, names)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-12)


def test_reference_passes_gradcheck_with_bias_and_gate(make_problem: Callable) -> None:
    selected = torch.tensor([[True, False, False], [False, True, True]])[None, None]
    problem = make_problem([2, 1], [2, 0, 3], head_dim=3, selected=selected)
    leaves = [problem.q, problem.k, problem.v, torch.randn(1, 1, 2, 3), torch.randn(1)]
    leaves = [x.to(problem.q.device, torch.float64).requires_grad_() for x in leaves]

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return compensated_attention(*x[:3], problem.blocks, bias=x[3], gate=x[4])

    assert torch.autograd.gradcheck(attend, leaves)


def test_blocks_of_one_token_make_it_dense_attention(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [1] * 12, head_dim=8)
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    out, _ = compensated_attention(q, k, v, problem.blocks)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense)


def test_reference_computes_half_inputs_in_fp32(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [16, 9, 16], dtype=torch.bfloat16)
    actual = problem.run(compensated_attention, torch.bfloat16)
    exact = problem.run(_formula, torch.float64)
    assert actual["out"].dtype == torch.bfloat16 and actual["lse"].dtype == torch.float32
    torch.testing.assert_close(actual["lse"].double(), exact["lse"], rtol=1e-6, atol=1e-6)
    # each part and their merge are rounded
    torch.testing.assert_close(actual["out"].double(), exact["out"], rtol=2**-7, atol=2**-9)


def test_autocast_does_not_lower_the_precision(make_problem: Callable) -> None:
    problem = make_problem([8, 8], [8, 8])
    plain = problem.run(compensated_attention, torch.float32)
    with torch.autocast(problem.q.device.type, torch.bfloat16):
        cast = problem.run(compensated_attention, torch.float32)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_triton_is_as_accurate_as_plain_pytorch(
    make_problem: Callable,
    assert_as_accurate: Callable,
    poisoned_empty: None,
    sizes: tuple[list[int], list[int]],
    dtype: torch.dtype,
) -> None:
    problem = make_problem(*sizes, batch=2, dtype=dtype)
    names = EXTRAS["both"]
    actual, plain = (_run(problem, f, dtype, names) for f in (_triton, _formula))
    exact = _run(problem, _formula, torch.float64, names)
    assert_as_accurate(actual, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["none selected", "all selected"])
def test_the_ends_of_sparsity_are_right(
    make_problem: Callable, assert_as_accurate: Callable, density: float, backend: str
) -> None:
    selected = torch.full((2, 2, 3, 4), density == 1)
    problem = make_problem([16, 16, 7], [16, 5, 16, 16], batch=2, selected=selected)
    attend = partial(compensated_attention, backend=backend)
    actual, plain = (problem.run(f, torch.float32) for f in (attend, _formula))
    assert_as_accurate(actual, plain, problem.run(_formula, torch.float64), 2**-23)
    if density == 1:
        exact = problem.run(partial(block_sparse_attention, backend=backend), torch.float32)
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_gate_of_minus_infinity_drops_the_centroids(make_problem: Callable, backend: str) -> None:
    problem = make_problem([16, 16, 7], [16, 5, 16, 16])
    gate = torch.full((2,), -torch.inf, device=problem.q.device, requires_grad=True)
    closed = problem.run(partial(compensated_attention, backend=backend, gate=gate), torch.float32)
    dropped = problem.run(partial(block_sparse_attention, backend=backend), torch.float32)
    torch.testing.assert_close(closed, dropped)
    assert gate.grad.eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_logits_of_a_thousand_do_not_overflow(
    make_problem: Callable, assert_as_accurate: Callable, backend: str
) -> None:
    problem = make_problem([16, 16], [1, 2, 16, 16])
    attend = partial(compensated_attention, backend=backend, scale=100.0)

    def formula(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        return _formula(q * (100 * q.shape[-1] ** 0.5), k, v, blocks)

    actual, plain = (problem.run(f, torch.float32) for f in (attend, formula))
    exact = problem.run(formula, torch.float64)
    assert exact["lse"].abs().max() > 1000
    assert_as_accurate(actual, plain, exact, 2**-16)  # fp32 holds an lse of 1000 to 2**-14


def test_uniform_blocks_need_no_offsets(make_problem: Callable) -> None:
    problem = make_problem([16, 16, 7], [16, 16, 16, 1], batch=2)
    uniform = replace(problem, blocks=replace(problem.blocks, is_uniform=True))
    plain, same = (p.run(_triton, torch.float32) for p in (problem, uniform))
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_few_programs_give_the_gradients_of_many(
    make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.kernels.compensated_attention import triton

    problem = make_problem([16] * 5, [16] * 3)
    many = problem.run(_triton, torch.float32)
    monkeypatch.setattr(triton, "_NUM_PROGRAMS", 4)
    torch.testing.assert_close(problem.run(_triton, torch.float32), many)


def test_transposed_inputs_and_gradients_change_nothing(make_problem: Callable) -> None:
    problem = make_problem([16, 9], [16, 16], batch=2)
    results = []
    for lay_out in (torch.clone, lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)):
        leaves = [lay_out(x).requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out, _ = _triton(*leaves, problem.blocks)
        results.append((out, *torch.autograd.grad(out, leaves, lay_out(problem.grad_out))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"bias": torch.zeros(2, 1, 1)}, r"bias must be torch.float32 \[1, 2, 1, 1\] on"),
        ({"gate": torch.zeros(1)}, r"gate must be torch.float32 \[2\] on .*, got torch.float32 "),
        ({"gate": torch.zeros(2).double()}, "got torch.float64 .*; expand or convert it"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_refused(
    make_problem: Callable, extra: dict[str, object], message: str
) -> None:
    problem = make_problem([4], [4])
    with pytest.raises(ValueError, match=message):
        compensated_attention(problem.q, problem.k, problem.v, problem.blocks, **extra)


@pytest.mark.gpu
@pytest.mark.parametrize("q_size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_triton_is_as_accurate_in_bf16_at_every_length(
    make_problem: Callable, assert_as_accurate: Callable, head_dim: int, q_size: int
) -> None:
    names = EXTRAS["both"]
    for num_tokens in (1, 63, 64, 65, 127, 129, 1000):
        sizes = [_tiles(num_tokens, size) for size in (q_size, 64)]
        problem = make_problem(*sizes, batch=2, head_dim=head_dim, dtype=torch.bfloat16)
        actual, plain = (_run(problem, f, torch.bfloat16, names) for f in (_triton, _formula))
        exact = _run(problem, _formula, torch.float64, names)
        assert_as_accurate(actual, plain, exact, 2**-8)


@pytest.mark.gpu
def test_twenty_backward_runs_give_the_same_bits(make_problem: Callable) -> None:
    sizes = _tiles(1000, 64)
    problem = make_problem(sizes, sizes, batch=2, heads=4, head_dim=64, dtype=torch.bfloat16)
    first = _run(problem, _triton, torch.bfloat16, EXTRAS["both"])
    for _ in range(19):
        again = _run(problem, _triton, torch.bfloat16, EXTRAS["both"])
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_a_new_length_or_count_compiles_nothing(make_problem: Callable) -> None:
    from gossamer.kernels.compensated_attention import triton as kernels

    def compiled() -> int:
        names = ("_columns", "_centroid_fwd", "_centroid_bwd_dq", "_centroid_bwd_dkv", "_spread")
        caches = (getattr(kernels, name).device_caches.values() for name in names)
        return sum(len(cache[0]) for of_kernel in caches for cache in of_kernel)

    counts = []
    for num_tokens in (1000, 65, 129, 1999):
        sizes = _tiles(num_tokens, 64)
        problem = make_problem(sizes, sizes, batch=1 + num_tokens % 2, heads=3, head_dim=64)
        problem.run(_triton, torch.bfloat16)
        counts.append(compiled())
    assert len(set(counts)) == 1


def _tiles(num_tokens: int, size: int) -> list[int]:
    full, rest = divmod(num_tokens, size)
    return [size] * full + [rest] * (rest > 0)
