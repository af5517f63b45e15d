"""Blocks: the lists say what was selected, forwards and backwards."""

from collections.abc import Callable

import pytest
import torch

from gossamer.kernels.blocks import Blocks, block_of_token


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_give_back_what_was_selected(
    make_blocks: Callable[..., Blocks], density: float
) -> None:
    selected = torch.rand(2, 3, 5, 7) < density
    blocks = make_blocks([4, 0, 2, 4, 1], [3] * 7, selected=selected)
    assert torch.equal(blocks.selected().cpu(), selected)


def test_lists_hold_the_selected_blocks_in_ascending_order_and_zeros_after_them(
    make_blocks: Callable[..., Blocks],
) -> None:
    selected = torch.rand(2, 2, 4, 6) < 0.5
    blocks = make_blocks([2] * 4, [2] * 6, selected=selected)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 4))).tolist():
        expected = selected[tuple(at)].nonzero().flatten().tolist()
        assert blocks.kv_num_blocks[tuple(at)] == len(expected)
        assert blocks.kv_indices[tuple(at)].tolist() == expected + [0] * (6 - len(expected))


def test_q_lists_are_the_transpose_of_the_kv_lists(make_blocks: Callable[..., Blocks]) -> None:
    selected = torch.rand(1, 3, 5, 4) < 0.4
    blocks = make_blocks([2] * 5, [3] * 4, selected=selected)
    transposed = make_blocks([3] * 4, [2] * 5, selected=selected.transpose(2, 3))
    assert torch.equal(blocks.q_num_blocks, transposed.kv_num_blocks)
    assert torch.equal(blocks.q_indices, transposed.kv_indices)


def test_every_tensor_is_contiguous_int32(make_blocks: Callable[..., Blocks]) -> None:
    blocks = make_blocks([2] * 5, [3] * 4)
    tensors = [x for x in vars(blocks).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in tensors)


def test_each_token_lies_in_the_block_whose_offsets_enclose_it() -> None:
    sizes = [3, 0, 0, 2, 1, 0, 4]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    expected = [block for block, size in enumerate(sizes) for _ in range(size)]
    assert block_of_token(offsets, 10).tolist() == expected


@pytest.mark.parametrize(
    "selected",
    [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 2, dtype=torch.bool), torch.ones(2, 2).bool()],
)
def test_a_selection_that_does_not_fit_the_offsets_is_refused(selected: torch.Tensor) -> None:
    offsets = torch.tensor([0, 4, 8])
    with pytest.raises(ValueError, match=r"selected must be bool \[B, H, 2, 2\]"):
        Blocks.from_selected(selected, offsets, offsets, 4, 4)
