import pytest
import torch

from gossamer.sparse import orders
from gossamer.sparse.layout import TokenGrid

GRIDS = [
    TokenGrid(4, 4, 4),
    TokenGrid(3, 5, 7),
    TokenGrid(1, 4, 6),
    TokenGrid(6, 1, 1),
    TokenGrid(1, 1, 1),
    TokenGrid(2, 9, 1, text_before=4, text_after=3),
]
ALL = {
    "row_major": orders.row_major,
    "temporal_major": orders.temporal_major,
    "sink_first": lambda grid: orders.temporal_major(grid, 1),
    "tiles": lambda grid: orders.tiles(grid, (2, 3, 4)),
    "hilbert": orders.hilbert,
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ALL)
def test_an_order_holds_every_video_token_once(name, grid):
    assert ALL[name](grid).sort().values.tolist() == list(range(grid.num_video))


@pytest.mark.parametrize("grid", GRIDS)
def test_temporal_major_order_puts_frame_and_position_at_position_times_frames_plus_frame(grid):
    order = orders.temporal_major(grid).tolist()
    positions = grid.height * grid.width
    for frame in range(grid.frames):
        for position in range(positions):
            assert order[position * grid.frames + frame] == frame * positions + position


def test_first_frames_stay_in_front_of_temporal_major_order():
    grid = TokenGrid(4, 1, 3)
    assert orders.temporal_major(grid, 1).tolist() == [0, 1, 2, 3, 6, 9, 4, 7, 10, 5, 8, 11]
    assert orders.temporal_major(grid, 4).tolist() == list(range(12))


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_the_hilbert_curve_moves_one_step_at_a_time_through_a_cube(side):
    order = orders.hilbert(TokenGrid(side, side, side))
    place = torch.stack([order // side**2, order // side % side, order % side])
    assert (place.diff(dim=1).abs().sum(0) == 1).all()
