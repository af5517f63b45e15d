import pytest
import torch

from gossamer.sparse.layout import RowMajor, TokenGrid


def tiles(block, grid):
    from gossamer.sparse.layout import Tiles

    return Tiles(block=block).build(grid)[0]


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(4, 4, 8), TokenGrid(3, 5, 7), TokenGrid(2, 3, 4, text_before=5, text_after=3)],
)
@pytest.mark.parametrize("block", [(2, 2, 4), (1, 1, 1), (4, 4, 4)])
def test_permute_then_unpermute_is_the_identity(grid, block):
    layout = tiles(block, grid)
    x = torch.randn(2, 3, grid.num_tokens, 4)
    assert torch.equal(layout.unpermute(layout.permute(x)), x)


def test_a_tile_holds_the_tokens_of_its_box_and_no_others():
    grid, (t, h, w) = TokenGrid(3, 5, 7), (2, 2, 4)
    layout = tiles((t, h, w), grid)
    boxes = []
    for start, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        tokens = layout.order[start:end]
        frame, row, column = tokens // 35, tokens % 35 // 7, tokens % 7
        boxes.append(
            {
                (int(f) // t, int(r) // h, int(c) // w)
                for f, r, c in zip(frame, row, column, strict=True)
            }
        )
    assert all(len(box) == 1 for box in boxes)
    assert len(set.union(*boxes)) == len(boxes) == 2 * 3 * 2


def test_the_sizes_of_all_blocks_sum_to_the_sequence():
    for layout in RowMajor(q_block=128, kv_block=64).build(TokenGrid(5, 7, 11)):
        assert layout.sizes.sum() == 5 * 7 * 11
        assert layout.sizes.max() == layout.block_size


def test_text_tokens_get_blocks_of_their_own():
    layout = tiles((2, 2, 4), TokenGrid(2, 2, 4, text_before=3, text_after=20))
    assert layout.text.tolist() == [True, False, True, True]
    assert layout.sizes.tolist() == [3, 16, 16, 4]


def test_a_grid_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 tokens but q has 17"):
        x = torch.zeros(1, 1, 17, 8)
        RowMajor(q_block=4, kv_block=4)(x, x, x, TokenGrid(1, 4, 4))


@pytest.mark.parametrize("block", [0, -1, 2.5])
def test_a_block_size_below_one_is_refused(block):
    with pytest.raises(ValueError, match="q_block"):
        RowMajor(q_block=block)
