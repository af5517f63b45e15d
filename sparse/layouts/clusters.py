"""Semantic clusters (SVG2, arXiv 2505.18875, section 4): blocks of like tokens, for each head."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.kmeans.op import cluster_order, kmeans
from gossamer.sparse.layout import BlockLayout, RowMajor, TokenGrid, check_grid, positive, run_sizes

_TOKENS_PER_Q, _TOKENS_PER_KV = 256, 64
_TEXT_BLOCK = 128  # tokens of a block of text
_SQUARINGS = 7  # of the covariance: as 128 steps of the power method


@dataclass(frozen=True, eq=False)
class Codebook:
    """The clusters of one layer and guidance branch: where the next step's k-means starts."""

    q: Tensor  # fp32 [B, H, Cq, D], centroids
    k: Tensor  # fp32 [B, H, Ck, D]
    q_labels: Tensor  # int32 [B, H, N], the cluster of each video token
    k_labels: Tensor  # int32 [B, H, N]

    def hit_rate(self, previous: "Codebook") -> Tensor:
        """Return the share of q and of k tokens that kept their cluster, fp32 [2, B, H]."""
        same = (self.q_labels == previous.q_labels, self.k_labels == previous.k_labels)
        return torch.stack([x.float().mean(-1) for x in same])

    def fits(self, x: Tensor, counts: tuple[int, int], grid: TokenGrid) -> bool:
        """Return whether it can start so many clusters of x [B, H, S, D]."""
        heads, width = x.shape[:2], x.shape[3]
        shapes = [(*heads, count, width) for count in counts]
        tokens = (*heads, grid.num_video)
        return [self.q.shape, self.k.shape] == shapes and self.q_labels.shape == tokens


class Clustering(NamedTuple):
    """What clusters make of one layer's q and k."""

    q_layout: BlockLayout
    kv_layout: BlockLayout
    codebook: Codebook


class Clusters:
    """K-means of the video tokens, of q and of k apart (SVG2, Tab. 6: one for both is worse).

    Deterministic, no sync, no state: the codebook of the step before is given and the new one
    returned. Text keeps blocks of its own.
    """

    def __init__(
        self,
        *,
        num_q: int | None = None,
        num_kv: int | None = None,
        iterations: int = 2,
        cold_iterations: int = 10,
        keep_until: float | None = None,
    ) -> None:
        """Take the counts of clusters (the video tokens / 256 and / 64 if left out).

        With keep_until a step keeps the labels of the last one while the probe error (of
        estimator error_aware) is at most 1 + keep_until times that at the clustering. The error
        that decides is the previous step's: no step waits for the GPU.
        """
        self.num_q = None if num_q is None else positive("num_q", num_q)
        self.num_kv = None if num_kv is None else positive("num_kv", num_kv)
        self.iterations = positive("iterations", iterations)
        self.cold_iterations = positive("cold_iterations", cold_iterations)
        if keep_until is not None and not keep_until >= 0:
            raise ValueError(
                f"keep_until={keep_until}: allowed is a growth of at least 0; e.g. keep_until=0.2"
            )
        self.keep_until = keep_until

    def counts(self, grid: TokenGrid) -> tuple[int, int]:
        """Return the number of q and of k clusters; ValueError where there are fewer tokens."""
        tokens = grid.num_video
        fields = (("num_q", self.num_q, _TOKENS_PER_Q), ("num_kv", self.num_kv, _TOKENS_PER_KV))
        for name, given, _ in fields:
            if given is not None and given > tokens:
                raise ValueError(
                    f"{name}={given}: allowed is at most the {tokens} video tokens; "
                    f"lower it or leave it out for {max(1, tokens // _TOKENS_PER_KV)} or fewer"
                )
        q, k = (given or max(1, round(tokens / each)) for _, given, each in fields)
        return q, k

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout of a cold start."""
        return self.cluster(q, k, grid, None)[:2]

    @torch.no_grad()
    def cluster(
        self, q: Tensor, k: Tensor, grid: TokenGrid, previous: Codebook | None
    ) -> Clustering:
        """Return the layouts of q, k [B, H, S, D] and the codebook, starting from the previous."""
        check_grid(grid, q)
        video = slice(grid.text_before, grid.text_before + grid.num_video)
        starts = (None, None) if previous is None else (previous.q, previous.k)
        iterations = self.cold_iterations if previous is None else self.iterations
        found_q, found_k = (
            kmeans(x[:, :, video], count, iterations=iterations, initial=start)
            for x, count, start in zip((q, k), self.counts(grid), starts, strict=True)
        )
        codebook = Codebook(found_q.centroids, found_k.centroids, found_q.labels, found_k.labels)
        return Clustering(*self.layouts(codebook, grid), codebook)

    def layouts(self, codebook: Codebook, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        """Return the q and the kv layout of the codebook's labels."""
        raise NotImplementedError


class SemanticClusters(Clusters):
    """Blocks are the clusters themselves, of any size, some perhaps empty (SVG2)."""

    block_shape = None

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        text = sum(len(run_sizes(n, _TEXT_BLOCK)) for n in (grid.text_before, grid.text_after))
        q, k = self.counts(grid)
        return q + text, k + text

    def layouts(self, codebook: Codebook, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        return (
            _own_blocks(codebook.q_labels, codebook.q.shape[2], grid),
            _own_blocks(codebook.k_labels, codebook.k.shape[2], grid),
        )


class SortedClusters(Clusters):
    """Tokens in the order of their clusters, cut into tiles of one size, for the fast kernels.

    Clusters follow each other along the first principal component of their centroids, so a tile
    that holds the end of one and the start of the next mixes neighbours.
    """

    def __init__(
        self,
        *,
        q_block: int = 128,
        kv_block: int = 64,
        num_q: int | None = None,
        num_kv: int | None = None,
        iterations: int = 2,
        cold_iterations: int = 10,
        keep_until: float | None = None,
    ) -> None:
        super().__init__(
            num_q=num_q,
            num_kv=num_kv,
            iterations=iterations,
            cold_iterations=cold_iterations,
            keep_until=keep_until,
        )
        self.tiles = RowMajor(q_block=q_block, kv_block=kv_block)
        self.block_shape = self.tiles.block_shape

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        self.counts(grid)  # refuses more clusters than tokens
        q_layout, kv_layout = self.tiles.build(grid)
        return q_layout.num_blocks, kv_layout.num_blocks

    def layouts(self, codebook: Codebook, grid: TokenGrid) -> tuple[BlockLayout, BlockLayout]:
        q_tiles, kv_tiles = self.tiles.on(codebook.q_labels.device, grid)
        return (
            _sorted(q_tiles, codebook.q, codebook.q_labels, grid),
            _sorted(kv_tiles, codebook.k, codebook.k_labels, grid),
        )


def _own_blocks(labels: Tensor, num_clusters: int, grid: TokenGrid) -> BlockLayout:
    order, offsets = cluster_order(labels, num_clusters)
    before, after = (run_sizes(n, _TEXT_BLOCK) for n in (grid.text_before, grid.text_after))

    def edges(sizes: Tensor, first: int) -> Tensor:
        ends = sizes.cumsum(0, dtype=torch.int32) + first
        return ends.to(offsets.device).expand(*offsets.shape[:-1], -1)

    start, end = grid.text_before, grid.text_before + grid.num_video
    parts = [offsets[..., :1], edges(before, 0), offsets[..., 1:] + start, edges(after, end)]
    text = None
    if len(before) or len(after):
        text = torch.ones(len(before) + num_clusters + len(after), dtype=torch.bool)
        text[len(before) : len(before) + num_clusters] = False
        text = text.to(offsets.device)
    return BlockLayout(torch.cat(parts, -1), grid.num_tokens, _with_text(order, grid), text)


def _sorted(tiles: BlockLayout, centroids: Tensor, labels: Tensor, grid: TokenGrid) -> BlockLayout:
    count = centroids.shape[2]
    sizes = torch.zeros_like(centroids[..., 0]).scatter_add_(
        2, labels.long(), torch.ones_like(labels, dtype=centroids.dtype)
    )  # whole numbers: exact in any order
    place = along_component(centroids, sizes).argsort(dim=-1, stable=True)  # [B, H, C]
    rank = torch.empty_like(place).scatter_(
        2, place, torch.arange(count, device=place.device).expand_as(place)
    )
    order, _ = cluster_order(rank.gather(2, labels.long()).int(), count)
    order = _with_text(order, grid)
    return BlockLayout(tiles.offsets, tiles.block_size, order, tiles.text, tiles.is_uniform)


def along_component(centroids: Tensor, weight: Tensor) -> Tensor:
    """Return each centroid's place on the first principal component, [B, H, C].

    Centroids [B, H, C, D] count as `weight` [B, H, C] points. The component's largest entry is
    positive. Deterministic, no sync.
    """
    share = weight / weight.sum(-1, keepdim=True)
    centered = centroids - (share[..., None] * centroids).sum(2, keepdim=True)
    power = (share[..., None] * centered).transpose(-1, -2) @ centered  # [B, H, D, D]
    tiny = torch.finfo(power.dtype).tiny
    for _ in range(_SQUARINGS):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=tiny)[..., None, None]
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)  # [B, H]
    index = largest[..., None, None].expand(*power.shape[:3], 1)
    return (centered @ power.gather(3, index)).squeeze(-1)


def _with_text(order: Tensor, grid: TokenGrid) -> Tensor:
    """Return the order of all tokens [B, H, S] from that of the video tokens [B, H, N]."""
    if grid.num_video == grid.num_tokens:
        return order
    token = torch.arange(grid.num_tokens, device=order.device).expand(*order.shape[:2], -1)
    start, end = grid.text_before, grid.text_before + grid.num_video
    return torch.cat([token[..., :start], order + start, token[..., end:]], -1)
