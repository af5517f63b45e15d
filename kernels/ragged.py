"""Tables that cut blocks of any size into tiles, built on the GPU without a host sync.

Blocks whose largest size the host does not know (clusters) have no fixed number of tiles. Two
tables take its place. The tile map says which rows of which block each program owns: there are at
most num_blocks + num_tokens // rows tiles, which is the size of the grid. The slot table holds, for
each list of blocks, their tokens in groups of at most GROUP, so that one tile gathers keys of
several small blocks: at 75 tokens a block, tiles of 64 that end with the block would be 30 % empty,
groups of 8 are 4 %.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import ceil_div, on_device
from .blocks import Blocks, head_stride

MAX_BLOCK = 128  # tokens; blocks up to it have a fixed number of tiles and need no tables
_ITEMS = tl.constexpr(64)  # blocks of a list that are cut at a time
_PIECES = tl.constexpr(16)  # pieces of each that are written at a time
# Entries of one slot table, 256 MiB: more heads than fit share a table, a few at a time.
_MAX_SLOTS = 1 << 26


@triton.jit
def own_tile(tiles_ptr, offsets_ptr, head):
    """Return block and first token of this program's tile, and how many tokens the block has there.

    A program past the last tile has 0 tokens.
    """
    return tile_at(tiles_ptr + head * tl.num_programs(0) + tl.program_id(0), offsets_ptr)


@triton.jit
def tile_at(entry_ptr, offsets_ptr):
    entry = tl.load(entry_ptr)
    used = tl.maximum(entry, 0)
    block = (used >> 32).to(tl.int32)
    start = (used & 0x7FFFFFFF).to(tl.int32)
    return block, start, tl.where(entry < 0, 0, tl.load(offsets_ptr + block + 1) - start)


@triton.jit
def gathered(slots_ptr, tile, lane, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return the token of each lane of a tile, int64 [BLOCK], and which lanes have one."""
    slot = tl.load(slots_ptr + tile * (BLOCK // GROUP) + lane // GROUP)
    return ((slot >> 5) + lane % GROUP).to(tl.int64), lane % GROUP < (slot & 31)


@triton.jit
def _write_pieces(
    out_ptr, indices_ptr, offsets_ptr, num_blocks, PIECE: tl.constexpr, IS_MAP: tl.constexpr
):  # fmt: skip
    """Write the pieces of the listed blocks (of all, for the map) in order; return their number."""
    item = tl.arange(0, _ITEMS)
    piece = tl.arange(0, _PIECES)[None, :]
    count = tl.zeros([], tl.int32)
    for first in range(0, num_blocks, _ITEMS):
        in_list = first + item < num_blocks
        block = first + item
        if not IS_MAP:
            block = tl.load(indices_ptr + block, in_list, other=0)
        start = tl.load(offsets_ptr + block, in_list, other=0)
        past = tl.load(offsets_ptr + block + 1, in_list, other=0)
        pieces = tl.cdiv(past - start, PIECE)
        at = count + tl.cumsum(pieces, 0) - pieces
        for part in range(0, tl.max(pieces, 0), _PIECES):
            token = start[:, None] + (part + piece) * PIECE
            if IS_MAP:
                entry = (block.to(tl.int64) << 32)[:, None] | token.to(tl.int64)
            else:
                entry = (token << 5) | tl.minimum(past[:, None] - token, PIECE)
            tl.store(out_ptr + at[:, None] + part + piece, entry, part + piece < pieces[:, None])
        count += tl.sum(pieces, 0)
    return count


@triton.jit(
    do_not_specialize=[
        "own_stride", "other_stride", "num_lists", "list_stride", "num_tiles", "num_slots",
    ]
)  # fmt: skip
def _cut(
    tiles_ptr, used_ptr, slots_ptr, counts_ptr, num_blocks_ptr, indices_ptr,
    own_offsets_ptr, other_offsets_ptr, own_stride, other_stride,
    num_lists, list_stride, num_tiles, num_slots,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write the tile map of a head (first program) or the slots of one of its lists."""
    row = tl.program_id(0) - 1
    head = tl.program_id(1).to(tl.int64)
    if row < 0:
        tiles_ptr += head * num_tiles
        own_offsets_ptr += head * own_stride
        count = _write_pieces(tiles_ptr, indices_ptr, own_offsets_ptr, num_lists, ROWS, True)
        tl.store(used_ptr + head, count)
        for first in range(count, num_tiles, 64):
            at = first + tl.arange(0, 64)
            tl.store(tiles_ptr + at, tl.full([64], -1, tl.int64), at < num_tiles)
    else:
        at_list = head * num_lists + row
        slots_ptr += at_list * num_slots
        indices_ptr += at_list * list_stride
        other_offsets_ptr += head * other_stride
        length = tl.load(num_blocks_ptr + at_list)
        count = _write_pieces(slots_ptr, indices_ptr, other_offsets_ptr, length, GROUP, False)
        tiles = tl.cdiv(count, GROUPS)
        at = count + tl.arange(0, GROUPS)
        tl.store(slots_ptr + at, tl.zeros([GROUPS], tl.int32), at < tiles * GROUPS)
        tl.store(counts_ptr + at_list, tiles)


class TileMap(NamedTuple):
    """Where the tiles of the blocks of some heads lie."""

    tiles: Tensor  # int64 [B, H, tiles]: block << 32 | first token, in order; -1 past the last
    used: Tensor  # int32 [B, H]: how many there are


class Tables(NamedTuple):
    """A tile map and the slot tables of the lists of its blocks."""

    tiles: Tensor  # as in TileMap
    slots: Tensor  # int32 [B, H, lists, slots]: first token << 5 | tokens of each group
    counts: Tensor  # int32 [B, H, lists]: tiles of slots that each list fills


def tile_map(offsets: Tensor, heads: torch.Size, num_tokens: int, rows: int) -> TileMap:
    """Return the tiles of at most `rows` of num_tokens tokens, cut by offsets; heads is [B, H]."""
    num_blocks = offsets.shape[-1] - 1
    made = _new_map(offsets, heads, num_blocks, num_tokens, rows)
    sizes = (num_blocks, 0, made.tiles.shape[-1], 0)
    _launch(1, made, *(offsets,) * 6, sizes, rows, 8, 8)
    return made


def tables(
    num_blocks: Tensor,
    indices: Tensor,
    own_offsets: Tensor,
    other_offsets: Tensor,
    num_own: int,
    num_other: int,
    rows: int,
    step: int,
    group: int,
) -> Tables:
    """Return the tables for programs that own `rows` tokens and meet listed ones `step` at a time.

    Args:
        num_blocks: [B, H, lists], how many blocks each list holds.
        indices: [B, H, lists, blocks], the lists.
        own_offsets: of the blocks that have the lists, [N + 1] or [B, H, N + 1].
        other_offsets: of the blocks in the lists.
        num_own: tokens that own_offsets cut.
        num_other: tokens that other_offsets cut, at most 2^26.
        group: at most this many tokens of a block stay together in a tile; 8 to 31, divides step.
    """
    num_lists = num_blocks.shape[2]
    made = _new_map(own_offsets, num_blocks.shape[:2], num_lists, num_own, rows)
    num_slots = slots_of_list(indices.shape[3], num_other, step, group)
    slots = indices.new_empty((*num_blocks.shape, num_slots))
    counts = torch.empty_like(num_blocks)
    _launch(
        num_lists + 1, made, slots, counts, num_blocks, indices, own_offsets, other_offsets,
        (num_lists, indices.shape[3], made.tiles.shape[-1], num_slots), rows, group, step // group,
    )  # fmt: skip
    return Tables(made.tiles, slots, counts)


def _new_map(
    offsets: Tensor, heads: torch.Size, num_blocks: int, num_tokens: int, rows: int
) -> TileMap:
    tiles = offsets.new_empty((*heads, num_blocks + num_tokens // rows), dtype=torch.int64)
    return TileMap(tiles, offsets.new_empty(heads, dtype=torch.int32))


def slots_of_list(num_blocks: int, num_tokens: int, step: int, group: int) -> int:
    """Return the slots that a list of all num_blocks blocks fills at most, in whole tiles."""
    return ceil_div(num_blocks + num_tokens // group, step // group) * (step // group)


def _launch(
    programs: int,
    made: TileMap,
    slots: Tensor,
    counts: Tensor,
    num_blocks: Tensor,
    indices: Tensor,
    own_offsets: Tensor,
    other_offsets: Tensor,
    sizes: tuple[int, int, int, int],
    rows: int,
    group: int,
    groups: int,
) -> None:
    with on_device(made.tiles.device):
        _cut[(programs, made.used.numel())](
            *made, slots, counts, num_blocks, indices, own_offsets, other_offsets,
            head_stride(own_offsets), head_stride(other_offsets), *sizes,
            ROWS=rows, GROUP=group, GROUPS=groups, num_warps=4,
        )  # fmt: skip


def heads_at_once(batch: int, heads: int, slots_per_head: int) -> Iterator[tuple[slice, slice]]:
    """Yield [B, H] in pieces whose slot table stays within a bound: all at once where it fits."""
    if batch * heads * slots_per_head <= _MAX_SLOTS:
        yield slice(None), slice(None)
        return
    step = max(1, _MAX_SLOTS // slots_per_head)
    for entry in range(batch):
        for head in range(0, heads, step):
            yield slice(entry, entry + 1), slice(head, head + step)


def of_heads(blocks: Blocks, at: tuple[slice, slice]) -> Blocks:
    """Return the blocks of some heads."""
    tensors = {name: x for name, x in vars(blocks).items() if isinstance(x, Tensor) and x.ndim > 1}
    return replace(blocks, **{name: x[at] for name, x in tensors.items()})
