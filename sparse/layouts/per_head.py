"""A token order for each head: blocks are runs of tokens in the head's own order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from gossamer.sparse import orders
from gossamer.sparse.fp32 import of_heads
from gossamer.sparse.layout import BlockLayout, Layout, TokenGrid, check_grid, positive, runs
from gossamer.sparse.layouts.clusters import SortedClusters

CLUSTERS = "sorted_clusters"
ORDERS = ("row_major", "temporal_major", "tiles", "hilbert", CLUSTERS)


class RunsPerHead:
    """Runs of tokens in one of several orders for each head, built once per grid and device."""

    def __init__(
        self, orders_of: Callable[[TokenGrid], Sequence[Tensor]], block_shape: tuple[int, int]
    ) -> None:
        self.orders_of = orders_of
        self.block_shape = block_shape
        self._built: dict[tuple[TokenGrid, torch.device], tuple[BlockLayout, BlockLayout]] = {}

    def __call__(
        self, choice: Tensor, q: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout, shared but for the order that each head takes.

        `choice` holds places in the orders, int64 [B, H], [H] or [1]; q [B, H, S, D].
        """
        check_grid(grid, q)
        key = (grid, q.device)
        if key not in self._built:
            q_layout, kv_layout = (layout.to(q.device) for layout in self.stacked(grid))
            self._built[key] = q_layout, kv_layout
        q_layout, kv_layout = self._built[key]
        assert q_layout.order is not None
        order = q_layout.order[choice].expand(*q.shape[:2], -1)  # [B, H, S]
        return replace(q_layout, order=order), replace(kv_layout, order=order)

    def build(self, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout in the first order."""
        return self._cut(grid, self.orders_of(grid)[0])

    def _cut(self, grid: TokenGrid, order: Tensor) -> tuple[BlockLayout, BlockLayout]:
        q_layout, kv_layout = (runs(grid, order, block) for block in self.block_shape)
        return q_layout, kv_layout

    def stacked(self, grid: TokenGrid) -> list[BlockLayout]:
        """Return the layouts with all orders, int64 [orders, S], in place of one."""
        cuts = [self._cut(grid, order) for order in self.orders_of(grid)]
        token = torch.arange(grid.num_tokens)
        stack = torch.stack([token if q.order is None else q.order for q, _ in cuts])
        return [replace(layout, order=stack) for layout in cuts[0]]


class TileClusters(SortedClusters):
    """Sorted clusters, as many as there are tiles."""

    def counts(self, grid: TokenGrid) -> tuple[int, int]:
        q, kv = (max(1, round(grid.num_video / block)) for block in self.tiles.block_shape)
        return q, kv


class PerHead(nn.Module):
    """One of several named token orders for each head, cut into runs alike for all heads.

    Every head starts in the first of `names`. All blocks but the last hold q_block or kv_block
    tokens whatever the grid, so the kernels for full blocks serve every order. Heads that take
    `sorted_clusters` are ordered anew by k-means (as many clusters as tiles), the others cost
    nothing at run time.
    """

    choice: Tensor  # int64 [H] or [1], each head's place in `names`

    def __init__(
        self,
        *,
        names: Sequence[str] = ORDERS[:-1],
        tile: Sequence[int] = (4, 4, 4),
        q_block: int = 128,
        kv_block: int = 64,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        for name in names:
            if name not in ORDERS:
                raise ValueError(f"names={name}: allowed is {', '.join(ORDERS)}; correct the name")
        if not names:
            raise ValueError(f"names=[]: allowed is one or more of {', '.join(ORDERS)}; add one")
        if len(tile) != 3:
            raise ValueError(f"tile={tile}: allowed is [frames, height, width]; give three sizes")
        self.names = tuple(names)
        self.tile = tuple(positive("tile", size) for size in tile)
        self.block_shape = (positive("q_block", q_block), positive("kv_block", kv_block))
        self.register_buffer("choice", torch.zeros(num_heads, dtype=torch.long))
        self._runs = RunsPerHead(self._orders, self.block_shape)
        self.clusters = TileClusters(q_block=q_block, kv_block=kv_block)
        self._in_clusters: tuple[tuple[int, int], Tensor] | None = None

    def with_clusters(self) -> Self:
        """Return a layout that may sort heads by cluster as well; the places of others stay."""
        own = self.for_heads(self.choice.numel())
        if CLUSTERS not in own.names:
            own.names += (CLUSTERS,)
        return own

    def for_heads(self, num_heads: int, head_dim: int | None = None) -> Self:
        """Return a layout of the same orders with its own choice for each of the heads."""
        q_block, kv_block = self.block_shape
        made = type(self)(
            names=self.names,
            tile=self.tile,
            q_block=q_block,
            kv_block=kv_block,
            num_heads=num_heads,
        )
        made.choice.copy_(of_heads("choice", self.choice, num_heads))
        return made

    def set_choice(self, choice: Tensor) -> None:
        """Set each head's place in `names`, integers [H]."""
        if not bool(((choice >= 0) & (choice < len(self.names))).all()):
            raise ValueError(
                f"choice={choice.tolist()}: allowed is 0 to {len(self.names) - 1}, the place of an "
                f"order in {list(self.names)}; correct the numbers"
            )
        self.choice.copy_(choice)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, cluster: Layout | None = None
    ) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout; q, k, v [B, H, S, D] in sequence order.

        `cluster` groups the tokens of the heads in clusters, e.g. from the last step's codebook.
        """
        q_layout, kv_layout = self._runs(self.choice, q, grid)
        if CLUSTERS not in self.names:
            return q_layout, kv_layout
        heads = self._heads_in_clusters()
        if not len(heads):
            return q_layout, kv_layout
        q_own, k_own, v_own = (x.index_select(1, heads) for x in (q, k, v))
        found = (cluster or self.clusters)(q_own, k_own, v_own, grid)
        assert q_layout.order is not None and kv_layout.order is not None
        q_order, kv_order = (
            static.index_copy(1, heads, own.order)  # type: ignore[arg-type]
            for static, own in zip((q_layout.order, kv_layout.order), found, strict=True)
        )
        return replace(q_layout, order=q_order), replace(kv_layout, order=kv_order)

    @torch.compiler.disable
    def _heads_in_clusters(self) -> Tensor:
        """Return the heads that take clusters, int64; the host looks again when a choice is set."""
        key = self.choice.data_ptr(), self.choice._version
        if self._in_clusters is None or self._in_clusters[0] != key:
            place = self.names.index(CLUSTERS)
            self._in_clusters = key, (self.choice == place).nonzero()[:, 0]
        return self._in_clusters[1]

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        """Return the number of q and of kv blocks, the same for every head."""
        q_layout, kv_layout = self._runs.build(grid)
        return q_layout.num_blocks, kv_layout.num_blocks

    def _orders(self, grid: TokenGrid) -> list[Tensor]:
        return [self._order(name, grid) for name in self.names]

    def _order(self, name: str, grid: TokenGrid) -> Tensor:
        match name:
            case "row_major":
                return orders.row_major(grid)
            case "temporal_major":
                return orders.temporal_major(grid)
            case "tiles":
                return orders.tiles(grid, self.tile)
            case "hilbert":
                return orders.hilbert(grid)
            case _:  # clusters take its place
                return orders.row_major(grid)
