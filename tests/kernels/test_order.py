"""The orders of tiles against sorts in Python; on a GPU, or in Triton's interpreter."""

import pytest
import torch

from gossamer.kernels.order import by_length, outliers_first


def _counts(heads: int, rows: int, high: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads * rows)
    return torch.randint(high, (2, heads, rows), generator=generator, dtype=torch.int32).to(device)


@pytest.mark.parametrize(
    ("heads", "rows", "high"), [(1, 1, 5), (3, 7, 2), (2, 300, 40), (4, 513, 9)]
)
def test_rows_of_a_head_come_by_length_the_longest_first_in_every_second(
    device: str, heads: int, rows: int, high: int
) -> None:
    counts = _counts(heads, rows, high, device)
    expected = []
    for head, of_head in enumerate(counts.flatten(0, 1).tolist()):
        rows_of_head = sorted(range(rows), key=lambda row: (-of_head[row], row))
        expected += [head * rows + row for row in rows_of_head[:: -1 if head % 2 else 1]]
    assert by_length(counts).tolist() == expected


@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (3, 7), (2, 300)])
def test_outliers_of_all_heads_come_before_the_heads(device: str, heads: int, rows: int) -> None:
    counts = _counts(heads, rows, 5, device)
    counts[..., ::50] = 60 + torch.arange(heads, dtype=torch.int32, device=device)[:, None]
    flat = counts.flatten().tolist()
    limit = 4 * sum(flat) / len(flat)
    expected = sorted(
        range(len(flat)),
        key=lambda i: (0, -flat[i], i) if flat[i] > limit else (1, i // rows, -flat[i], i),
    )
    assert outliers_first(counts, 100).tolist() == expected
