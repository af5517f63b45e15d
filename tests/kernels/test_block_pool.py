"""Block means, both backends, against a loop over the blocks."""

from functools import partial

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean, block_mean_pair

both = pytest.mark.parametrize("backend", ["reference", "triton"])


def _offsets(sizes: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device)


def _loop(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum(2) / max(part.shape[2], 1) for part in x.split(sizes, 2)], 2)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [3, 0, 5, 0, 1], [7], [33, 70]])
def test_block_mean_divides_each_block_by_its_own_size(
    device: str, sizes: list[int], dtype: torch.dtype, backend: str
) -> None:
    x = torch.randn(2, 3, sum(sizes), 5, dtype=dtype, device=device)
    mean = block_mean(x, _offsets(sizes, device), max(sizes), backend=backend)
    assert mean.dtype == dtype and mean.is_contiguous()
    torch.testing.assert_close(mean, _loop(x, sizes))


@both
@pytest.mark.parametrize("sizes", [[2, 2], [2, 0, 1]])
def test_block_mean_passes_gradcheck(device: str, sizes: list[int], backend: str) -> None:
    x = torch.randn(1, 2, sum(sizes), 3, dtype=torch.float64, device=device, requires_grad=True)
    mean = partial(block_mean, offsets=_offsets(sizes, device), block_size=2, backend=backend)
    assert torch.autograd.gradcheck(lambda x: mean(x), x)


@both
def test_a_larger_block_size_than_needed_changes_nothing(device: str, backend: str) -> None:
    x = torch.randn(1, 2, 12, 4, device=device)
    mean = partial(block_mean, x, _offsets([4, 4, 4], device), backend=backend)
    torch.testing.assert_close(mean(9), mean(4))
    torch.testing.assert_close(mean(5000), mean(4))


@both
def test_a_block_of_thousands_of_tokens_beside_small_ones(device: str, backend: str) -> None:
    sizes = [3, 4000, 0, 40]
    x = torch.randn(1, 2, sum(sizes), 4, dtype=torch.float64, device=device, requires_grad=True)
    mean = block_mean(x, _offsets(sizes, device), max(sizes), backend=backend)
    expected = _loop(x, sizes)
    torch.testing.assert_close(mean, expected)
    weight = torch.randn_like(mean)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, weight)[0] for y in (mean, expected)))


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "reference"), (torch.float16, "triton")]
)
def test_half_inputs_are_summed_in_fp32(device: str, dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(1, 1, 300, 2, device=device).to(dtype)
    for sizes in ([150, 150], [200, 100]):
        mean = block_mean(x, _offsets(sizes, device), max(sizes), backend=backend)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, _loop(x.float(), sizes))


@both
@pytest.mark.parametrize("dims", [(1, 2), (2, 3), (1, 3)])
def test_transposed_inputs_give_the_same_means_and_gradients(
    device: str, dims: tuple[int, int], backend: str
) -> None:
    x = torch.randn(2, 3, 8, 4, device=device)
    stored = x.transpose(*dims).contiguous().transpose(*dims)
    for sizes in ([4, 4], [5, 3]):
        results = []
        for leaf in (x.clone().requires_grad_(), stored.clone().requires_grad_()):
            mean = block_mean(leaf, _offsets(sizes, device), max(sizes), backend=backend)
            results.append((mean, *torch.autograd.grad(mean.square().sum(), leaf)))
        for plain, transposed in zip(*results, strict=True):
            torch.testing.assert_close(plain, transposed)


@both
def test_nan_behind_the_last_token_changes_no_bit(device: str, backend: str) -> None:
    buffer = torch.full((1, 1, 16, 4), torch.nan, device=device)
    clean = torch.randn(1, 1, 9, 4, device=device)
    buffer[:, :, :9] = clean
    mean = partial(block_mean, offsets=_offsets([4, 4, 1], device), block_size=4, backend=backend)
    assert torch.equal(mean(buffer[:, :, :9]), mean(clean))


@both
def test_a_pair_gives_the_bits_of_two_single_calls(device: str, backend: str) -> None:
    x_sizes, y_sizes = [16, 16, 3], [5, 0, 2000]
    cuts = [(_offsets(sizes, device), max(sizes)) for sizes in (x_sizes, y_sizes)]
    leaves = [
        torch.randn(2, 3, sum(sizes), 20, device=device, requires_grad=True)
        for sizes in (x_sizes, y_sizes)
    ]
    (x_offsets, x_size), (y_offsets, y_size) = cuts
    pair = block_mean_pair(*leaves, x_offsets, y_offsets, x_size, y_size, backend=backend)
    single = [block_mean(x, *cut, backend=backend) for x, cut in zip(leaves, cuts, strict=True)]
    weights = [torch.randn_like(mean) for mean in pair]
    gradients = [torch.autograd.grad(means, leaves, weights) for means in (pair, single)]
    assert all(map(torch.equal, pair, single))
    assert all(map(torch.equal, *gradients))


def test_a_pair_that_does_not_match_is_refused() -> None:
    x, y = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 6)
    offsets = _offsets([4])
    with pytest.raises(ValueError, match="x and y must share B, H, D and dtype"):
        block_mean_pair(x, y, offsets, offsets, 4, 4)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be .*, got 'cuda'"):
        block_mean(torch.randn(1, 1, 4, 2), _offsets([4]), 4, backend="cuda")


@pytest.mark.parametrize(
    ("offsets", "block_size", "message"),
    [
        ([0, 4, 7], 4, "must rise from 0 to the 8 tokens"),
        ([1, 4, 8], 4, "must rise from 0"),
        ([0, 4, 8], 3, "at most block_size 3"),
        ([0, 9, 8], 9, "in steps of -1"),
        ([0, 4, 8], 0, "must be >= 1, got 0"),
        ([0.0, 8.0], 8, "must be int32 or int64"),
        ([[[0, 4, 8]], [[0, 4, 8]]], 4, r"\[1, 1, 'N \+ 1'\]"),
    ],
)
def test_wrong_offsets_are_refused(offsets: list[int], block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_mean(torch.randn(1, 1, 8, 2), torch.tensor(offsets), block_size)


def test_the_operators_pass_opcheck(device: str) -> None:
    x, y = (torch.randn(1, 2, n, 16, device=device, requires_grad=True) for n in (9, 12))
    x_offsets, y_offsets = _offsets([4, 0, 5], device), _offsets([12], device)
    block_mean(x, x_offsets, 5, backend="triton")
    ops = torch.ops.gossamer
    torch.library.opcheck(ops.block_mean.default, (x, x_offsets, 5))
    torch.library.opcheck(ops.block_mean_pair.default, (x, y, x_offsets, y_offsets, 5, 12))
    grad = torch.randn(1, 2, 3, 16, device=device)
    arguments = (grad, x_offsets, 5, 9, torch.float16)
    torch.library.opcheck(ops.block_mean_backward.default, arguments)


@both
def test_compiled_equals_eager_without_a_graph_break(device: str, backend: str) -> None:
    x = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    offsets = _offsets([4, 0, 5], device)

    def pooled(x: Tensor) -> Tensor:
        return block_mean(x, offsets, 5, backend=backend).square()

    outputs = pooled(x), torch.compile(pooled, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in outputs))
