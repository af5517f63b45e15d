"""Block scores, both backends, against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_score.op import block_score

both = pytest.mark.parametrize("backend", ["reference", "triton"])


def _means(device: str, batch: int, rows: int, columns: int, dim: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(batch, 2, rows, dim, device=device),
        torch.randn(batch, 2, columns, dim, device=device),
    )


def _offsets(num_blocks: int, device: str) -> Tensor:
    sizes = torch.randint(0, 65, (num_blocks,))
    sizes[0] = 64
    return torch.cat([torch.zeros(1), sizes.cumsum(0)]).int().to(device)


def _exact(q_mean: Tensor, k_mean: Tensor, offsets: Tensor, scale: float) -> Tensor:
    logits = q_mean.double() @ k_mean.double().transpose(-1, -2) * scale
    return (logits + offsets.diff().double().log()).softmax(-1)


@both
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "dim"),
    [(2, 5, 7, 16), (1, 1, 1, 64), (2, 17, 65, 20), (1, 3, 700, 32)],
)
def test_scores_are_the_softmax_over_kv_blocks_weighted_by_their_tokens(
    device: str, batch: int, rows: int, columns: int, dim: int, backend: str
) -> None:
    q_mean, k_mean = _means(device, batch, rows, columns, dim)
    offsets = _offsets(columns, device)
    score = block_score(q_mean, k_mean, offsets, backend=backend)
    expected = _exact(q_mean, k_mean, offsets, dim**-0.5)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)
    assert score.dtype == torch.float32 and score.is_contiguous()
    assert (score[..., offsets.diff() == 0] == 0).all()


@both
def test_a_key_common_to_all_blocks_costs_no_accuracy(device: str, backend: str) -> None:
    q_mean, k_mean = _means(device, 1, 9, 40, 32)
    k_mean += 100 * torch.randn(1, 2, 1, 32, device=device)
    offsets = _offsets(40, device)
    score = block_score(q_mean, k_mean, offsets, backend=backend)
    expected = _exact(q_mean, k_mean, offsets, 32**-0.5)
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=0)


@both
def test_transposed_means_and_a_scale_of_ones_own(device: str, backend: str) -> None:
    q_mean, k_mean = _means(device, 2, 6, 9, 16)
    stored = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q_mean, k_mean))
    offsets = _offsets(9, device).long()
    score = block_score(*stored, offsets, scale=0.7, backend=backend)
    expected = _exact(q_mean, k_mean, offsets, 0.7)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


def test_a_nan_stays_in_its_row(device: str) -> None:
    q_mean, k_mean = _means(device, 1, 20, 5, 16)
    q_mean[0, 0, 3] = torch.nan
    score = block_score(q_mean, k_mean, _offsets(5, device), backend="triton")
    assert score[0, 0, 3].isnan().all() and score.isnan().sum() == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_mean": torch.randn(1, 1, 3, 8).half()}, "q_mean must be a float32"),
        ({"k_mean": torch.randn(1, 8)}, "k_mean must be a float32"),
        ({"k_mean": torch.randn(1, 1, 4, 6)}, "must share B, H and D"),
        ({"kv_offsets": torch.arange(4)}, r"kv_offsets must be \[5\] or \[1, 1, 5\]"),
        ({"scale": 0.0}, "scale must be finite and > 0, got 0.0"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "q_mean": torch.randn(1, 1, 3, 8),
        "k_mean": torch.randn(1, 1, 4, 8),
        "kv_offsets": torch.arange(5),
    }
    with pytest.raises(ValueError, match=message):
        block_score(**(arguments | change))  # type: ignore[arg-type]


def test_the_operator_passes_opcheck(device: str) -> None:
    arguments = *_means(device, 1, 3, 4, 16), _offsets(4, device)
    block_score(*arguments, backend="triton")
    torch.library.opcheck(torch.ops.gossamer.block_score.default, (*arguments, 0.25))
