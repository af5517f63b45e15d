"""Which tokens are video, and how tokens are grouped into blocks."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from gossamer.kernels.permute.op import permute, unpermute
from gossamer.sparse import orders


@dataclass(frozen=True)
class TokenGrid:
    """The token sequence of one sample: text before, frames x height x width video, text after."""

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    @property
    def num_video(self) -> int:
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.text_before + self.num_video + self.text_after

    def is_text(self) -> Tensor:
        """Return bool [S], True for text tokens."""
        text = torch.ones(self.num_tokens, dtype=torch.bool)
        text[self.text_before : self.text_before + self.num_video] = False
        return text


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """One partition of the tokens into blocks, shared by all heads or one for each.

    `order` lists the token at each position (None keeps the sequence order); block b holds the
    positions offsets[b] to offsets[b + 1]; `text` marks blocks of text, which stay dense.
    """

    offsets: Tensor  # int32 [N + 1] or [B, H, N + 1]
    block_size: int  # tokens of the largest block, or more
    order: Tensor | None = None  # int64 [S] or [B, H, S]
    text: Tensor | None = None  # bool [N]
    is_uniform: bool = False  # every block but the last holds block_size tokens

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[-1] - 1

    @cached_property
    def sizes(self) -> Tensor:
        """Return the true token count of each block, int64 [N] or [B, H, N]."""
        return self.offsets.diff().long()

    def permute(self, x: Tensor) -> Tensor:
        """Bring x [B, H, S, D] from sequence order into block order."""
        return permute((x,), (self.order,))[0]

    def unpermute(self, x: Tensor) -> Tensor:
        """Bring x [B, H, S, D] from block order back into sequence order."""
        return unpermute((x,), (self.order,))[0]

    def of_first(self, samples: int) -> "BlockLayout":
        """Return the layout of the first samples of the batch."""
        offsets = self.offsets if self.offsets.ndim == 1 else self.offsets[:samples]
        order = self.order if self.order is None or self.order.ndim == 1 else self.order[:samples]
        return BlockLayout(offsets, self.block_size, order, self.text, self.is_uniform)

    def to(self, device: torch.device) -> "BlockLayout":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return BlockLayout(
            self.offsets.to(device),
            self.block_size,
            move(self.order),
            move(self.text),
            self.is_uniform,
        )


def permute_qkv(
    q_layout: BlockLayout, kv_layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring q, k and v [B, H, S, D] from sequence order into block order, in one launch."""
    q, k, v = permute((q, k, v), (q_layout.order, kv_layout.order, kv_layout.order))
    return q, k, v


class Layout(Protocol):
    """Groups the tokens of q and of k: static layouts use the grid only, others also q, k and v."""

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """Return the tokens of the largest q and kv block, None where q and k decide."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout; q, k, v [B, H, S, D] in sequence order."""

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        """Return the number of q and of kv blocks."""


class _Static:
    """A layout that depends on the grid alone, built once per grid and device."""

    def __init__(self) -> None:
        self._built: dict[tuple[TokenGrid, torch.device], tuple[BlockLayout, BlockLayout]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        check_grid(grid, q)
        return self.on(q.device, grid)

    def on(self, device: torch.device, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout of a grid on the device."""
        key = (grid, device)
        if key not in self._built:
            q_layout, kv_layout = self.build(grid)
            same = q_layout is kv_layout
            q_layout = q_layout.to(device)
            self._built[key] = q_layout, q_layout if same else kv_layout.to(device)
        return self._built[key]

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        """Return the number of q and of kv blocks."""
        q_layout, kv_layout = self.build(grid)
        return q_layout.num_blocks, kv_layout.num_blocks

    def build(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        raise NotImplementedError


class RowMajor(_Static):
    """Blocks of consecutive tokens, as in SpargeAttention (q_block 128, kv_block 64)."""

    def __init__(self, *, q_block: int = 128, kv_block: int = 64) -> None:
        super().__init__()
        self.block_shape = (positive("q_block", q_block), positive("kv_block", kv_block))

    def build(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        order = orders.row_major(grid)
        q_layout, kv_layout = (runs(grid, order, block) for block in self.block_shape)
        return q_layout, kv_layout


class Tiles(_Static):
    """3-D tiles of frames x height x width tokens; tiles at the border may be smaller."""

    def __init__(self, *, block: tuple[int, int, int] = (2, 2, 4)) -> None:
        super().__init__()
        if len(block) != 3:
            raise ValueError(f"block={block}: allowed is [frames, height, width]; give three sizes")
        self.block = tuple(positive("block", size) for size in block)
        self.block_shape = (prod(self.block), prod(self.block))

    def build(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        tile = orders.tile_of_token(grid, self.block)
        order = torch.argsort(tile, stable=True)
        layout = _with_text(grid, order, torch.bincount(tile), prod(self.block))
        return layout, layout


def runs(grid: TokenGrid, order: Tensor, block: int) -> BlockLayout:
    """Cut the video tokens, in an order int64 [num_video], into runs of `block`, the last shorter.

    Text tokens get runs of their own before and after, whatever the order.
    """
    return _with_text(grid, order, run_sizes(grid.num_video, block), block)


def _with_text(grid: TokenGrid, video_order: Tensor, sizes: Tensor, block: int) -> BlockLayout:
    """Add blocks of text tokens before and after the video blocks."""
    before, after = run_sizes(grid.text_before, block), run_sizes(grid.text_after, block)
    text_after = torch.arange(grid.text_after) + grid.text_before + grid.num_video
    before_video = torch.arange(grid.text_before)
    order = torch.cat([before_video, video_order + grid.text_before, text_after])
    all_sizes = torch.cat([before, sizes, after])
    offsets = torch.cat([all_sizes.new_zeros(1), all_sizes.cumsum(0)]).int()
    text = torch.ones(len(all_sizes), dtype=torch.bool)
    text[len(before) : len(before) + len(sizes)] = False
    identity = torch.equal(order, torch.arange(grid.num_tokens))
    has_text = bool(text.any())
    return BlockLayout(
        offsets,
        block,
        None if identity else order,
        text if has_text else None,
        is_uniform=bool((all_sizes[:-1] == block).all()),
    )


def run_sizes(tokens: int, block: int) -> Tensor:
    """Return the sizes of runs of `block` tokens, the last of what is left, int64 [runs]."""
    full, rest = divmod(tokens, block)
    return torch.tensor([block] * full + [rest] * (rest > 0), dtype=torch.long)


def check_grid(grid: TokenGrid, q: Tensor) -> None:
    """Raise ValueError unless q [B, H, S, D] holds the tokens of the grid."""
    if q.shape[2] != grid.num_tokens:
        raise ValueError(
            f"grid={grid}: it has {grid.num_tokens} tokens but q has {q.shape[2]}; "
            "pass the grid of the model's own latents"
        )


def positive(field: str, size: int) -> int:
    """Return the size; ValueError unless it is an integer of at least 1 that int32 can hold."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
        raise ValueError(f"{field}={size}: allowed is an integer of at least 1; e.g. {field}=64")
    return size
