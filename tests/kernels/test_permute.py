"""Permutation of tokens: both backends against indexing, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gossamer.kernels.permute.op import permute, unpermute

BACKENDS = ("reference", "triton")


@pytest.fixture
def make_order(device: str) -> Callable[..., Tensor]:
    def make(num_tokens: int, *, per_head: bool) -> Tensor:
        rows = [torch.randperm(num_tokens) for _ in range(6 if per_head else 1)]
        order = torch.stack(rows).to(device)
        return order.view(2, 3, num_tokens) if per_head else order[0]

    return make


def _indexed(x: Tensor, order: Tensor) -> Tensor:
    order = order.expand(x.shape[:3])
    rows = [x[b, h, order[b, h]] for b in range(x.shape[0]) for h in range(x.shape[1])]
    return torch.stack(rows).view(x.shape)


def _like_wan(*shape: int, device: str) -> Tensor:
    """Return [B, H, S, D] stored as [B, S, H, D], as a projection leaves q, k and v."""
    batch, heads, num_tokens, dim = shape
    return torch.randn(batch, num_tokens, heads, dim, device=device).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("num_tokens", [1, 33, 70])
def test_permute_indexes_and_unpermute_undoes_it(
    make_order: Callable, device: str, num_tokens: int, per_head: bool, backend: str
) -> None:
    x = _like_wan(2, 3, num_tokens, 20, device=device)
    order = make_order(num_tokens, per_head=per_head)
    (y,) = permute((x,), (order,), backend=backend)
    assert torch.equal(y, _indexed(x, order))
    assert torch.equal(unpermute((y,), (order,), backend=backend)[0], x)
    assert y.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_q_and_kv_move_by_their_own_orders_and_lengths(
    make_order: Callable, device: str, backend: str
) -> None:
    q = _like_wan(2, 3, 17, 16, device=device)
    k, v = (_like_wan(2, 3, 40, 16, device=device) for _ in range(2))
    q_order, kv_order = make_order(17, per_head=True), make_order(40, per_head=False)
    orders = (q_order, kv_order, kv_order.int())
    moved = permute((q, k, v), orders, backend=backend)
    for y, x, order in zip(moved, (q, k, v), orders, strict=True):
        assert torch.equal(y, _indexed(x, order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_without_an_order_is_returned_as_it_is(
    make_order: Callable, device: str, backend: str
) -> None:
    q, k = (_like_wan(2, 3, 9, 16, device=device) for _ in range(2))
    order = make_order(9, per_head=False)
    moved = permute((q, k), (None, order), backend=backend)
    assert moved[0] is q
    assert torch.equal(moved[1], _indexed(k, order))
    assert permute((q,), (None,), backend=backend)[0] is q


@pytest.mark.parametrize("move", [permute, unpermute])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_the_way_back(
    make_order: Callable, device: str, move: Callable, backend: str
) -> None:
    q, k = (_like_wan(2, 3, 11, 16, device=device).requires_grad_() for _ in range(2))
    orders = make_order(11, per_head=False), make_order(11, per_head=True)
    grads = [_like_wan(2, 3, 11, 16, device=device) for _ in range(2)]
    actual = torch.autograd.grad(move((q, k), orders, backend=backend), (q, k), grads)
    other = unpermute if move is permute else permute
    for grad, expected in zip(actual, other(grads, orders, backend="reference"), strict=True):
        assert torch.equal(grad, expected)
    used = move((q, k), orders, backend=backend)[1]
    grad, expected = torch.autograd.grad(used.sum(), k)[0], torch.ones_like(k)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_values_are_moved_whatever_the_type(
    make_order: Callable, device: str, dtype: torch.dtype, backend: str
) -> None:
    x = (1000 * torch.randn(2, 3, 12, 16, device=device)).to(dtype)
    order = make_order(12, per_head=True)
    (y,) = permute((x,), (order,), backend=backend)
    assert y.dtype == dtype
    assert torch.equal(y, _indexed(x, order))


def test_triton_moves_the_bits_of_nan(make_order: Callable, device: str) -> None:
    bits = torch.randint(-(2**15), 2**15, (2, 3, 12, 16), dtype=torch.int32, device=device)
    bits, order = bits.to(torch.int16), make_order(12, per_head=True)
    (y,) = permute((bits.view(torch.bfloat16),), (order,), backend="triton")
    assert torch.equal(y.view(torch.int16), _indexed(bits, order))


def test_any_strides_are_taken(make_order: Callable, device: str) -> None:
    order = make_order(9, per_head=False)
    for x in (
        torch.randn(2, 3, 16, 9, device=device).transpose(2, 3),
        torch.randn(1, 3, 9, 1, device=device).expand(2, 3, 9, 16),
    ):
        assert torch.equal(permute((x,), (order,), backend="triton")[0], _indexed(x, order))


def test_the_operator_passes_opcheck(make_order: Callable, device: str) -> None:
    x = _like_wan(2, 3, 9, 16, device=device).requires_grad_()
    order = make_order(9, per_head=False)
    permute((x,), (order,), backend="triton")
    torch.library.opcheck(torch.ops.gossamer.permute.default, ([x, x], [order, order], False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(make_order: Callable, device: str, backend: str) -> None:
    x = _like_wan(2, 3, 9, 16, device=device).requires_grad_()
    order = make_order(9, per_head=True)

    def twice(x: Tensor) -> Tensor:
        y, z = permute((x, 2 * x), (order, order), backend=backend)
        return unpermute((y * z,), (order,), backend=backend)[0]

    traced = torch.compile(twice, fullgraph=True, backend="aot_eager")
    outs = [f(x) for f in (twice, traced)]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in outs))


def test_auto_is_the_reference_on_a_cpu() -> None:
    x = torch.randn(1, 1, 4, 3, dtype=torch.float64)  # triton would refuse the type
    assert torch.equal(permute((x,), (torch.arange(4).flip(0),))[0], x.flip(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": []}, "one to 3 with one order each, got 1 tensors and 0 orders"),
        ({"orders": [torch.zeros(4, dtype=torch.long)]}, "each of the tokens 0 to 3 once"),
        ({"orders": [torch.arange(5)]}, r"must be \[4\] or \[1, 2, 4\] .*, got \[5\]"),
        ({"orders": [torch.arange(4.0)]}, "must be int32 or int64"),
        ({"tensors": [torch.zeros(2, 4, 8)]}, "non-empty"),
        ({"tensors": [torch.zeros(1, 2, 4, 8).double()], "backend": "triton"}, "2 or 4 bytes"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"tensors": [torch.zeros(1, h, 4, 8) for h in (2, 1)], "num": 2}, "must share batch"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    orders = [torch.arange(4)] * change.pop("num", 1)
    arguments = {"tensors": [torch.zeros(1, 2, 4, 8)], "orders": orders, "backend": "reference"}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        permute(**arguments)


@pytest.mark.gpu
def test_no_sync_and_no_recompilation() -> None:
    from gossamer.kernels.permute import triton as kernels

    def run(num_tokens: int) -> None:
        x = _like_wan(2, 3, num_tokens, 64, device="cuda").bfloat16()
        order = torch.arange(num_tokens, device="cuda").flip(0).repeat(2, 3, 1)
        y, z = permute((x, x), (order, order[0, 0]))
        unpermute((y, z), (order, order[0, 0]))

    def compiled() -> int:
        return sum(len(cache[0]) for cache in kernels._permute.device_caches.values())

    run(512)
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for num_tokens in (333, 1000, 1):
            run(num_tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before
