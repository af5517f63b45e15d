"""Lloyd's algorithm in plain PyTorch: it defines what the kernels must compute."""

import torch
from torch import Tensor

from ..cluster_order import sort_points


def forward(x: Tensor, initial: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return labels [B, H, N], centroids [B, H, C, D] and the flat order and offsets."""
    num_clusters = initial.shape[2]
    heads = [
        _lloyd(*each, iterations)
        for each in zip(x.flatten(0, 1).to(initial.dtype), initial.flatten(0, 1), strict=True)
    ]
    labels, centroids = (torch.stack(each) for each in zip(*heads, strict=True))
    shape = x.shape[:2]
    flat = sort_points(labels, num_clusters)
    return labels.unflatten(0, shape), centroids.unflatten(0, shape), *flat


def _lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster the points [N, D] of one head."""
    # Distances do not change with the origin; near the points they cancel least.
    center = centroids.mean(0)
    cluster = torch.arange(len(centroids), device=x.device)
    for _ in range(iterations):
        c = centroids - center
        score = (x - center) @ c.T - c.square().sum(1) / 2  # largest where the distance is least
        label = score.argmax(1)
        member = (label == cluster[:, None]).double()  # [C, N]
        size = member.sum(1, keepdim=True)
        mean = (member @ x.double() / size.clamp(min=1)).to(x.dtype)
        centroids = torch.where(size > 0, mean, centroids)
    return label.int(), centroids
