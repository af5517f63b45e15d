"""Lloyd's algorithm in Triton: assignment, a stable sort of the labels, means of the runs.

With m the mean of the initial centroids and t = c - m rounded to the points' type, the assignment
takes the largest of x.t - (m.t + |t|^2 / 2), which is the least distance of x to m + t: rounding is
relative to the spread of the centroids, not to their size. A point goes to the lowest index of
equally good ones. A mean is summed in the order of the points: no atomics, so the results are the
same every time.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cluster_order import sort_points

_RUN_TIME = ["num_heads", "num_points", "num_clusters", "padded_clusters"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _kmeans_assign(
    x_ptr, table_ptr, norm_ptr, label_ptr,
    stride_xb, stride_xh, stride_xn,
    num_heads, num_points, padded_clusters,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    dim = tl.arange(0, PADDED_DIM)
    x_ptr += (head // num_heads) * stride_xb + (head % num_heads) * stride_xh
    x_ptrs = x_ptr + point.to(tl.int64)[:, None] * stride_xn + dim[None, :]
    x = tl.load(x_ptrs, mask=(point < num_points)[:, None] & (dim < DIM)[None, :], other=0.0)
    table_ptrs = table_ptr + head * padded_clusters * PADDED_DIM
    table_ptrs += column[:, None] * PADDED_DIM + dim[None, :]
    norm_ptrs = norm_ptr + head * padded_clusters + column

    # Each column keeps its own best; they meet once, after the loop.
    best = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
    tile = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    for start in range(0, padded_clusters, BLOCK_C):
        table = tl.load(table_ptrs + start * PADDED_DIM)
        score = tl.dot(x, tl.trans(table), input_precision="ieee")
        score -= tl.load(norm_ptrs + start)[None, :]
        is_better = score > best
        best = tl.where(is_better, score, best)
        tile = tl.where(is_better, start, tile)

    is_best = best == tl.max(best, 1)[:, None]
    label = tl.min(tl.where(is_best, tile + column[None, :], padded_clusters), 1)
    tl.store(label_ptr + head * num_points + point, label, mask=point < num_points)


@triton.jit(do_not_specialize=_RUN_TIME)
def _kmeans_means(
    x_ptr, order_ptr, offsets_ptr, center_ptr, centroid_ptr, table_ptr, norm_ptr,
    stride_xb, stride_xh, stride_xn,
    num_heads, num_points, num_clusters, padded_clusters,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Replace a centroid by the mean of its points, if any, and write its row of the table."""
    cluster = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    segment = head * num_clusters + cluster
    start, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < DIM
    x_ptr += (head // num_heads) * stride_xb + (head % num_heads) * stride_xh
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for at in range(start, end, ROWS):
        is_point = at + row < end
        point = tl.load(order_ptr + at + row, mask=is_point, other=0) - head * num_points
        mask = is_point[:, None] & is_dim[None, :]
        x = tl.load(x_ptr + point[:, None] * stride_xn + dim[None, :], mask=mask, other=0.0)
        total += x.to(tl.float32)

    centroid_ptrs = centroid_ptr + segment * DIM + dim
    if end > start:
        centroid = tl.math.div_rn(tl.sum(total, 0), (end - start).to(tl.float32))
        tl.store(centroid_ptrs, centroid, mask=is_dim)
    else:
        centroid = tl.load(centroid_ptrs, mask=is_dim, other=0.0)
    center = tl.load(center_ptr + head * DIM + dim, mask=is_dim, other=0.0)
    table = (centroid - center).to(table_ptr.dtype.element_ty)
    slot = head * padded_clusters + cluster
    tl.store(table_ptr + slot * PADDED_DIM + dim, table)
    rounded = table.to(tl.float32)
    tl.store(norm_ptr + slot, tl.sum(rounded * (center + 0.5 * rounded), 0))


class _Tiles(NamedTuple):
    points: int
    clusters: int
    num_warps: int
    num_stages: int


_ASSIGN = {2: _Tiles(128, 64, 8, 3), 4: _Tiles(32, 32, 4, 1)}  # by bytes per element
_ROWS = 32  # points of a cluster that are summed at a time


@torch.library.custom_op("gossamer::kmeans", mutates_args=())
def _kmeans(x: Tensor, initial: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, num_points, dim = x.shape
    num_clusters, groups = initial.shape[2], batch * heads
    tiles = _ASSIGN[x.element_size()]
    padded_dim = max(16, triton.next_power_of_2(dim))
    padded_clusters = triton.cdiv(num_clusters, tiles.clusters) * tiles.clusters
    centroids = initial.clone(memory_format=torch.contiguous_format)
    center = centroids.mean(2)
    table = x.new_zeros(groups, padded_clusters, padded_dim)
    # A column past the last cluster scores -inf.
    norm = torch.full((groups, padded_clusters), torch.inf, device=x.device)
    labels = torch.empty(groups, num_points, dtype=torch.int32, device=x.device)

    def update(order: Tensor, offsets: Tensor) -> None:
        _kmeans_means[(num_clusters, groups)](
            x, order, offsets, center, centroids, table, norm, *x.stride()[:3],
            heads, num_points, num_clusters, padded_clusters,
            DIM=dim, PADDED_DIM=padded_dim, ROWS=_ROWS,
        )  # fmt: skip

    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        no_points = torch.zeros(groups * num_clusters + 1, dtype=torch.long, device=x.device)
        update(no_points, no_points)
        for _ in range(iterations):
            _kmeans_assign[(triton.cdiv(num_points, tiles.points), groups)](
                x, table, norm, labels, *x.stride()[:3], heads, num_points, padded_clusters,
                DIM=dim, PADDED_DIM=padded_dim, BLOCK_N=tiles.points, BLOCK_C=tiles.clusters,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
            order, offsets = sort_points(labels, num_clusters)
            update(order, offsets)
    return labels.view(batch, heads, num_points), centroids, order, offsets


@_kmeans.register_fake
def _(x: Tensor, initial: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    points, clusters = x.shape[:3].numel(), initial.shape[:3].numel()
    return (
        x.new_empty(x.shape[:3], dtype=torch.int32),
        initial.new_empty(initial.shape),
        x.new_empty(points, dtype=torch.long),
        x.new_empty(clusters + 1, dtype=torch.long),
    )


def forward(x: Tensor, initial: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return labels [B, H, N], centroids [B, H, C, D] and the flat order and offsets."""
    return _kmeans(x, initial, iterations)
