"""Index lists of a block mask: both backends against a loop."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_lists.op import block_lists

both = pytest.mark.parametrize("backend", ["reference", "triton"])


def _loop(selected: Tensor) -> tuple[Tensor, Tensor]:
    counts = selected.sum(-1, dtype=torch.int32)
    lists = torch.zeros(selected.shape, dtype=torch.int32, device=selected.device)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in selected.shape[:3])).tolist():
        found = selected[tuple(at)].nonzero().flatten()
        lists[tuple(at)][: len(found)] = found.int()
    return counts, lists


@both
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (1, 2, 40, 3), (1, 1, 3, 700)])
def test_lists_name_the_selected_in_ascending_order_and_zeros_after_them(
    device: str, shape: tuple[int, ...], density: float, backend: str
) -> None:
    selected = torch.rand(shape, device=device) < density
    lists = block_lists(selected, backend=backend)
    expected = *_loop(selected), *_loop(selected.transpose(2, 3))
    assert all(map(torch.equal, lists, expected))
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists)


@both
def test_a_transposed_mask_is_read_right(device: str, backend: str) -> None:
    selected = torch.rand(2, 2, 6, 5, device=device) < 0.5
    lists = block_lists(selected.transpose(2, 3), backend=backend)
    swapped = block_lists(selected, backend=backend)
    assert all(map(torch.equal, lists, (*swapped[2:], *swapped[:2])))


@pytest.mark.parametrize("selected", [torch.ones(1, 1, 2, 2), torch.ones(2, 2).bool()])
def test_what_is_no_mask_is_refused(selected: Tensor) -> None:
    with pytest.raises(ValueError, match=r"selected must be bool \[B, H, R, C\]"):
        block_lists(selected)


def test_the_operator_passes_opcheck(device: str) -> None:
    selected = torch.rand(1, 2, 3, 5, device=device) < 0.5
    block_lists(selected, backend="triton")
    torch.library.opcheck(torch.ops.gossamer.block_lists.default, (selected,))
