"""Static orders of the video tokens: which token, counted frame by frame, stands at each place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gossamer.sparse.layout import TokenGrid


def row_major(grid: TokenGrid) -> Tensor:
    """Return the model's own order, int64 [num_video]: frame by frame, row by row."""
    return torch.arange(grid.num_video)


def temporal_major(grid: TokenGrid, first: int = 0) -> Tensor:
    """Return the order, int64 [num_video], in which a position's tokens of all frames adjoin.

    Token (f, p) stands at p * frames + f (SVG1, arXiv 2502.01776). The `first` frames stay in
    front as they are, and the others are ordered among themselves.
    """
    token = torch.arange(grid.num_video).view(grid.frames, -1)
    return torch.cat([token[:first].flatten(), token[first:].T.flatten()])


def tiles(grid: TokenGrid, block: tuple[int, ...]) -> Tensor:
    """Return the order, int64 [num_video], in which the tokens of each 3-D tile adjoin."""
    return torch.argsort(tile_of_token(grid, block), stable=True)


def tile_of_token(grid: TokenGrid, block: tuple[int, ...]) -> Tensor:
    """Return the tile of frames x height x width tokens of each token, int64 [num_video]."""
    frame, row, column = (axis // size for axis, size in zip(_axes(grid), block, strict=True))
    tiles_high, tiles_wide = -(-grid.height // block[1]), -(-grid.width // block[2])
    return (frame * tiles_high + row) * tiles_wide + column


def hilbert(grid: TokenGrid) -> Tensor:
    """Return the order, int64 [num_video], along a 3-D Hilbert curve through the whole video.

    The curve fills the smallest cube of a power of 2 that holds the grid; places outside the grid
    are left out (J. Skilling, Programming the Hilbert curve, 2004).
    """
    axes = [axis.clone() for axis in _axes(grid)]
    bits = (max(grid.frames, grid.height, grid.width) - 1).bit_length()
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for axis in axes:
            is_set = (axis >> bit) & 1 == 1
            swap = torch.where(is_set, 0, (axes[0] ^ axis) & low)
            axes[0] ^= torch.where(is_set, low, swap)
            axis ^= swap
    for i in (1, 2):
        axes[i] ^= axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in range(1, bits):
        flip ^= torch.where((axes[2] >> bit) & 1 == 1, (1 << bit) - 1, 0)
    index = torch.zeros_like(flip)
    for bit in reversed(range(bits)):
        for axis in axes:
            index = 2 * index + (((axis ^ flip) >> bit) & 1)
    return torch.argsort(index, stable=True)


def _axes(grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Return frame, row and column of each video token, each int64 [num_video]."""
    token = torch.arange(grid.num_video)
    row = token // grid.width
    return row // grid.height, row % grid.height, token % grid.width
