"""Quantised attention: the reference against exact attention, Triton against the reference.

The interpreter multiplies INT8 exactly but rounds fp32 to e4m3 wrongly (no carry, no saturation),
so its conversions are replaced by PyTorch's; on a GPU nothing is replaced.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.merge import merge
from gossamer.kernels.quantized import (
    MAX_SAMPLE,
    Quantized,
    sample_step,
    slot_order,
)
from gossamer.kernels.quantized_attention.op import (
    attend_quantized,
    quantize,
    quantized_block_sparse_attention,
)

BACKENDS = ("reference", "triton")
KINDS = [("int8", "fp8"), ("fp8", "fp8"), ("int8", "none")]
SIZES = {
    "full": ([64] * 2, [32] * 3),
    "ragged last block": ([64, 9], [64, 64, 1]),
    "variable": ([16, 5, 0, 33], [9, 16, 0, 40, 13]),
}


@pytest.fixture(autouse=True)
def right_e4m3_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == tl.float8e4nv:
            wide = torch.from_numpy(x.astype(np.float32)).clamp(-448, 448)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv:
            narrow = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float8_e4m3fn)
            bits = {tl.float16: torch.float16, tl.float32: torch.float32}[target]
            return narrow.to(bits).numpy().view(f"uint{8 * bits.itemsize}")
        return original(x, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def problem(make_blocks: Callable, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return q, k, v in fp16 and blocks of given sizes."""

    def make(
        q_sizes: list[int], kv_sizes: list[int], *, head_dim: int = 64, **kwargs: object
    ) -> tuple[Tensor, Tensor, Tensor, Blocks]:
        blocks = make_blocks(q_sizes, kv_sizes, **kwargs)
        generator = torch.Generator().manual_seed(1)
        lengths = (sum(q_sizes), sum(kv_sizes), sum(kv_sizes))
        heads = blocks.kv_num_blocks.shape[:2]
        tensors = (torch.randn(*heads, n, head_dim, generator=generator) for n in lengths)
        return *(x.half().to(device) for x in tensors), blocks

    return make


def _exact(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(q.double(), k.double(), v.double(), blocks)


def _error(actual: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference = actual.double()[finite] - exact[finite]
    return (difference.norm() / exact[finite].norm()).item()


@pytest.mark.parametrize(("qk", "pv"), KINDS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_reference_is_close_to_exact_attention(
    problem: Callable, sizes: tuple[list[int], list[int]], qk: str, pv: str
) -> None:
    tensors = problem(*sizes, batch=2, heads=3)
    out, lse = quantized_block_sparse_attention(*tensors, qk=qk, pv=pv)
    exact = _exact(*tensors)
    # Half a step of e4m3 is 2^-4 at most and 0.026 in the mean square of uniform mantissas.
    assert _error(out, exact[0]) < (0.02 if (qk, pv) == ("int8", "none") else 0.06)
    assert (lse - exact[1])[exact[1].isfinite()].abs().max() < (0.03 if qk == "int8" else 0.15)


@pytest.mark.parametrize(("qk", "pv"), KINDS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_triton_equals_the_reference_to_rounding(
    problem: Callable,
    poisoned_empty: None,
    sizes: tuple[list[int], list[int]],
    qk: str,
    pv: str,
) -> None:
    tensors = problem(*sizes)
    actual, expected = (
        quantized_block_sparse_attention(*tensors, qk=qk, pv=pv, backend=backend)
        for backend in ("triton", "reference")
    )
    assert _error(actual[0], expected[0].double()) < 2e-3
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("head_dim", "sizes"), [(64, ([128], [128, 70])), (128, ([128, 70], [64, 33]))]
)
def test_triton_equals_the_reference_at_every_head_dim_and_block_size(
    problem: Callable, head_dim: int, sizes: tuple[list[int], list[int]]
) -> None:
    tensors = problem(*sizes, head_dim=head_dim, heads=1)
    actual, expected = (
        quantized_block_sparse_attention(*tensors, backend=backend)
        for backend in ("triton", "reference")
    )
    assert _error(actual[0], expected[0].double()) < 2e-3
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("qk", "pv"), KINDS)
def test_triton_quantises_as_the_reference_does(
    problem: Callable, poisoned_empty: None, qk: str, pv: str
) -> None:
    _, k, v, blocks = problem([64], [33, 0, 64, 7], batch=2)
    actual, expected = (quantize(k, v, blocks, qk=qk, pv=pv, backend=x) for x in BACKENDS)
    for field in fields(Quantized):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if not isinstance(one, Tensor):
            assert one == other
        elif one.dtype in (torch.int8, torch.float8_e4m3fn):
            # The means may differ in their last bit, and with them a value on the edge of a step.
            assert (one.float() != other.float()).float().mean() < 1e-3, field.name
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_keys_and_values_give_the_same_bits(problem: Callable, backend: str) -> None:
    q, k, v, blocks = problem([64, 9], [64, 40])
    ready = quantize(k, v, blocks, backend=backend)
    prepared = attend_quantized(q, ready, blocks, backend=backend)
    direct = quantized_block_sparse_attention(q, k, v, blocks, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(prepared, direct, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_common_mean_is_smoothed_away_and_back_in_the_lse(
    problem: Callable, backend: str
) -> None:
    q, k, v, blocks = problem([64, 64], [64, 64], heads=1)
    offset = torch.randn(64, generator=torch.Generator().manual_seed(2)).to(q)
    k, v = k + 8 * offset, v + 4 * offset
    out, lse = quantized_block_sparse_attention(q, k, v, blocks, backend=backend)
    exact = _exact(q, k, v, blocks)
    assert _error(out - 4 * offset, exact[0] - 4 * offset.double()) < 0.1
    assert (lse - exact[1]).abs().max() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_merge_to_the_whole(problem: Callable, make_blocks: Callable, backend: str) -> None:
    selected = torch.tensor([[True, False, True], [False, True, True]])[None, None]
    q, k, v, _ = problem([64, 64], [64, 64, 40], heads=1)
    parts = []
    for mask in (selected, ~selected):
        blocks = make_blocks([64, 64], [64, 64, 40], selected=mask)
        parts += quantized_block_sparse_attention(q, k + 4, v, blocks, backend=backend)
    whole = make_blocks([64, 64], [64, 64, 40], selected=torch.ones_like(selected))
    exact = _exact(q, k + 4, v, whole)
    out, lse = merge(*parts)
    assert _error(out, exact[0]) < 0.06 and _error(lse, exact[1]) < 1e-3


@pytest.mark.parametrize("pv", ["fp8", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_gets_out_0_and_lse_minus_infinity(
    problem: Callable, backend: str, pv: str
) -> None:
    q, k, v, blocks = problem([64, 9], [32, 32, 0])  # head 0: row 0 is empty
    out, lse = quantized_block_sparse_attention(q, k, v + 3, blocks, pv=pv, backend=backend)
    assert out[0, 0, :64].eq(0).all() and lse[0, 0, :64].eq(-torch.inf).all()
    assert out.isfinite().all() and lse[0, 1].isfinite().all()


@pytest.mark.parametrize(("qk", "pv"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_constants_have_no_nan(problem: Callable, backend: str, qk: str, pv: str) -> None:
    q, k, v, blocks = problem([64, 9], [32, 32], heads=1)
    for zero in (q, k, v):
        tensors = [torch.zeros_like(x) if x is zero else x for x in (q, k, v)]
        exact = _exact(*tensors, blocks)
        out, lse = quantized_block_sparse_attention(*tensors, blocks, qk=qk, pv=pv, backend=backend)
        assert (out - exact[0]).norm() <= 0.06 * exact[0].norm()
        assert (lse - exact[1]).abs().max() < 0.15
    out, _ = quantized_block_sparse_attention(
        q, k, torch.full_like(v, 2), blocks, qk=qk, pv=pv, backend=backend
    )
    torch.testing.assert_close(out, torch.full_like(out, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_very_different_size_keep_their_precision(
    problem: Callable, make_blocks: Callable, backend: str
) -> None:
    q, k, v, _ = problem([32] * 3, [32] * 3, heads=1)
    v = v.unflatten(2, (3, 32)) - v.unflatten(2, (3, 32)).mean(3, keepdim=True)  # no mean to take
    v = (v * torch.tensor([1, 1e-3, 1e-2]).to(v)[:, None, None]).flatten(2, 3)
    blocks = make_blocks([32] * 3, [32] * 3, selected=torch.eye(3).bool()[None, None])
    out, _ = quantized_block_sparse_attention(q, k, v, blocks, backend=backend)
    exact, _ = _exact(q, k, v, blocks)
    for row in (slice(0, 32), slice(32, 64), slice(64, 96)):
        assert _error(out[:, :, row], exact[:, :, row]) < 0.08


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_change_nothing(problem: Callable, backend: str) -> None:
    q, k, v, blocks = problem([32, 9], [32, 9], batch=2)
    packed = torch.stack([q, k, v], 3).transpose(1, 2).contiguous()  # [B, S, H, 3, D]
    strided = packed.transpose(1, 2).unbind(3)
    results = (
        quantized_block_sparse_attention(*tensors, blocks, pv=pv, backend=backend)
        for tensors in ((q, k, v), strided)
        for pv in ("fp8", "none")
    )
    plain, plain_none, other, other_none = results
    for a, b in zip((*plain, *plain_none), (*other, *other_none), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pv", ["fp8", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_the_last_token_changes_no_bit(problem: Callable, backend: str, pv: str) -> None:
    *tensors, blocks = problem([64, 9], [32, 3])

    def padded(x: Tensor) -> Tensor:
        buffer = x.new_full((*x.shape[:2], x.shape[2] + 64, x.shape[3]), torch.nan)
        return buffer[:, :, : x.shape[2]].copy_(x)

    clean = quantized_block_sparse_attention(*tensors, blocks, pv=pv, backend=backend)
    poisoned = quantized_block_sparse_attention(
        *map(padded, tensors), blocks, pv=pv, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 7, 1024, 1025, 4096, 32760, 32768, 75600])
def test_a_sample_meets_no_token_twice_and_every_column_of_a_frame(num_tokens: int) -> None:
    sample = torch.arange(min(num_tokens, MAX_SAMPLE)) * sample_step(num_tokens) % num_tokens
    assert sample.unique().numel() == sample.numel()
    if num_tokens > 30000:
        for width in (52, 64, 80):
            assert torch.bincount(sample % width, minlength=width).min() >= 1


def test_slot_order_is_the_register_order_of_wgmma() -> None:
    slots = slot_order(torch.arange(32))
    assert slots[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(slots[16:], slots[:16] + 16)


@pytest.mark.parametrize("pv", ["fp8", "none"])
def test_both_operators_pass_opcheck(problem: Callable, pv: str) -> None:
    from gossamer.kernels.quantized_attention import operator

    q, k, v, blocks = problem([64], [32, 9], heads=1)
    # test_schema multiplies the inputs, which fp8 cannot on a CPU.
    arguments = (k, v, blocks.kv_offsets, blocks.kv_block_size, "int8", pv)
    torch.library.opcheck(operator._quantize, arguments, test_utils="test_faketensor")
    ready = quantize(k, v, blocks, pv=pv, backend="triton")
    lists = (blocks.kv_num_blocks, blocks.kv_indices, blocks.q_offsets, blocks.kv_offsets)
    sizes = (blocks.q_block_size, blocks.kv_block_size)
    arguments = (q, *vars(ready).values(), *lists, *sizes, 0.125, "triton")
    torch.library.opcheck(operator._attention, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk": "int4"}, "qk must be 'int8' or 'fp8', got 'int4'"),
        ({"pv": "bf16"}, "pv must be 'fp8' or 'none', got 'bf16'"),
        ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
        ({"backend": "hopper"}, "for backend 'hopper'"),
        ({"scale": -1.0}, "scale must be finite and > 0, got -1.0"),
    ],
)
def test_unknown_settings_are_refused(
    problem: Callable, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantized_block_sparse_attention(*problem([8], [8]), **change)


def test_inputs_it_cannot_serve_are_refused(problem: Callable) -> None:
    q, k, v, blocks = problem([8], [8])
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16"):
        quantized_block_sparse_attention(q.float(), k.float(), v.float(), blocks)
    with pytest.raises(ValueError, match=r"head dim must be one of \(64, 128\).*got 32"):
        quantized_block_sparse_attention(
            q[..., :32], k[..., :32], v[..., :32], blocks, backend="triton"
        )
    with pytest.raises(ValueError, match="k and v must be"):
        quantize(k, v[:, :, :4], blocks)
    ready = quantize(k, v, blocks)
    with pytest.raises(ValueError, match=r"quantized must hold .* quantize k and v with the same"):
        attend_quantized(q[..., :32], ready, blocks)
    with pytest.raises(ValueError, match="at least 500 slots"):
        attend_quantized(q, ready, replace(blocks, kv_block_size=500))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_input_that_wants_a_gradient_is_refused_while_gradients_are_on(
    problem: Callable, name: str
) -> None:
    q, k, v, blocks = problem([8], [8])
    tensors = {"q": q, "k": k, "v": v}
    tensors[name] = tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient.*torch.no_grad\(\)"):
        quantized_block_sparse_attention(**tensors, blocks=blocks)
    with torch.no_grad():
        out, lse = quantized_block_sparse_attention(**tensors, blocks=blocks)
    assert not out.requires_grad and not lse.requires_grad
