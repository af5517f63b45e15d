"""Block means against a loop over the blocks."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def _loop(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum(2) / max(part.shape[2], 1) for part in x.split(sizes, 2)], 2)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [3, 0, 5, 0, 1], [7]])
def test_block_mean_divides_each_block_by_its_own_size(sizes: list[int]) -> None:
    x = torch.randn(2, 3, sum(sizes), 5, dtype=torch.float64)
    mean = block_mean(x, _offsets(sizes), max(sizes))
    torch.testing.assert_close(mean, _loop(x, sizes))


@pytest.mark.parametrize("sizes", [[2, 2], [2, 0, 1]])
def test_block_mean_passes_gradcheck(sizes: list[int]) -> None:
    x = torch.randn(1, 2, sum(sizes), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_mean(x, _offsets(sizes), 2), x)


def test_a_larger_block_size_than_needed_changes_nothing() -> None:
    x = torch.randn(1, 2, 12, 4)
    offsets = _offsets([4, 4, 4])
    torch.testing.assert_close(block_mean(x, offsets, 9), block_mean(x, offsets, 4))


def test_half_inputs_are_summed_in_fp32() -> None:
    x = torch.randn(1, 1, 300, 2).to(torch.bfloat16)
    for sizes in ([150, 150], [200, 100]):
        mean = block_mean(x, _offsets(sizes), max(sizes))
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, _loop(x.float(), sizes))


def test_transposed_inputs_give_the_same_means() -> None:
    x = torch.randn(2, 8, 3, 4).transpose(1, 2)
    for sizes in ([4, 4], [5, 3]):
        offsets = _offsets(sizes)
        actual = block_mean(x, offsets, max(sizes))
        torch.testing.assert_close(actual, block_mean(x.contiguous(), offsets, max(sizes)))


def test_nan_behind_the_last_token_changes_no_bit() -> None:
    buffer = torch.full((1, 1, 16, 4), torch.nan)
    clean = torch.randn(1, 1, 9, 4)
    buffer[:, :, :9] = clean
    offsets = _offsets([4, 4, 1])
    assert torch.equal(block_mean(buffer[:, :, :9], offsets, 4), block_mean(clean, offsets, 4))


@pytest.mark.parametrize(
    ("offsets", "block_size", "message"),
    [
        ([0, 4, 7], 4, "must rise from 0 to the 8 tokens"),
        ([1, 4, 8], 4, "must rise from 0"),
        ([0, 4, 8], 3, "at most block_size 3"),
        ([0, 9, 8], 9, "in steps of -1"),
        ([0, 4, 8], 0, "must be >= 1, got 0"),
        ([0.0, 8.0], 8, "1-D int32 or int64"),
    ],
)
def test_wrong_offsets_are_refused(offsets: list[int], block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_mean(torch.randn(1, 1, 8, 2), torch.tensor(offsets), block_size)
