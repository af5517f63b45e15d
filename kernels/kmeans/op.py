"""K-means: batched and deterministic, with exact means of the labels that it returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import check_triton, stands_for_gpu
from ..cluster_order import per_group, sort_points

BACKENDS = ("reference", "triton")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_DIM = 256


class Clusters(NamedTuple):
    """A partition of the points of each batch and head into C clusters, some possibly empty."""

    labels: Tensor  # int32 [B, H, N], the cluster of each point
    centroids: Tensor  # fp32 [B, H, C, D], the mean of each cluster
    sizes: Tensor  # int32 [B, H, C]
    order: Tensor  # int64 [B, H, N], the points sorted by cluster, ascending within each
    offsets: Tensor  # int32 [B, H, C + 1], first position of each cluster in the order


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int,
    initial: Tensor | None = None,
    backend: str = "auto",
) -> Clusters:
    """Return clusters of x after some rounds of Lloyd's algorithm; deterministic, no sync.

    A round gives each point the nearest centroid, the first of equally near ones, then makes each
    centroid the mean of its points: the centroids returned are the means of the labels returned,
    in fp32 (fp64 for fp64 inputs). A cluster without points has size 0 and keeps its last centroid.
    No gradient flows. The triton backend rounds centroids to x's type to measure distances, less
    the mean of the initial ones.

    Args:
        x: [B, H, N, D].
        num_clusters: C, at most N.
        iterations: rounds, at least 1; there is no early exit.
        initial: [B, H, C, D], where the centroids start, e.g. those of an earlier call; points
            spread over the sequence if left out.
        backend: "reference" (plain PyTorch, any device), "triton" or "auto", triton on CUDA where
            type and dim allow it.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    _check(x, num_clusters, iterations, initial)
    backend = _choose_backend(backend, x)
    x = x.detach()
    start = _spread(x, num_clusters) if initial is None else initial.detach()
    start = start.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    match backend:
        case "reference":
            from .reference import forward
        case _:
            from .triton import forward
    labels, centroids, order, offsets = forward(x, start, iterations)
    order, offsets = _per_head(order, offsets, labels)
    return Clusters(labels, centroids, offsets.diff(), order, offsets)


def cluster_order(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return order int64 [B, H, N] and offsets int32 [B, H, C + 1] of labels [B, H, N]; no sync.

    The order sorts the points by label, ascending within each: cluster c holds the positions
    offsets[c] to offsets[c + 1].
    """
    order, offsets = sort_points(labels.flatten(0, 1), num_clusters)
    return _per_head(order, offsets, labels)


def _per_head(order: Tensor, offsets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    batch_heads = labels.shape[:2]
    order, offsets = per_group(order, offsets, batch_heads.numel())
    return order.unflatten(0, batch_heads), offsets.unflatten(0, batch_heads)


def _spread(x: Tensor, num_clusters: int) -> Tensor:
    """Return one point of each of C equal stretches of the sequence, [B, H, C, D]."""
    index = torch.arange(num_clusters, device=x.device)
    start = index * x.shape[2] // num_clusters
    length = (index + 1) * x.shape[2] // num_clusters - start
    # Steps of the golden ratio within the stretches: a fixed place would fall into columns of the
    # video wherever its width divides the length.
    jitter = (index * 0x9E3779B1 % 2**32) * length // 2**32
    return x.index_select(2, start + jitter)


def _check(x: Tensor, num_clusters: int, iterations: int, initial: Tensor | None) -> None:
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"x must be a non-empty floating-point [B, H, N, D] tensor, got {x.dtype} "
            f"{list(x.shape)}; unflatten the heads first"
        )
    if not 1 <= num_clusters <= x.shape[2]:
        raise ValueError(
            f"num_clusters must be 1 to the {x.shape[2]} points, got {num_clusters}; ask for fewer"
        )
    if iterations < 1:
        raise ValueError(
            f"iterations must be >= 1, got {iterations}; centroids are means only after a round"
        )
    expected = (*x.shape[:2], num_clusters, x.shape[3])
    if initial is not None and (
        initial.shape != expected or initial.device != x.device or not initial.is_floating_point()
    ):
        raise ValueError(
            f"initial must be floating-point {list(expected)} on {x.device}, got {initial.dtype} "
            f"{list(initial.shape)} on {initial.device}; pass the centroids of an earlier call"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, values in (("x", x), ("initial", initial)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity; find what produced it")


def _choose_backend(backend: str, x: Tensor) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}; use 'auto'"
        )
    fits = x.dtype in _TRITON_DTYPES and x.shape[3] <= _TRITON_MAX_DIM
    if backend == "auto":
        backend = "triton" if stands_for_gpu(x.device) and fits else "reference"
    if backend == "triton":
        if not fits:
            raise ValueError(
                "x must be float32, float16 or bfloat16 of at most "
                f"{_TRITON_MAX_DIM} dims for backend 'triton', got {x.dtype} of {x.shape[3]}; "
                "use backend='reference' or 'auto'"
            )
        check_triton(x.device, x.dtype)
    return backend
