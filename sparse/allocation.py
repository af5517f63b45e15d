"""Budgets from measured error curves: water-filling over heads (spec: Option C)."""

import torch
from torch import Tensor


def water_fill(
    density: Tensor, error: Tensor, *, target: float, num_blocks: int, floor: int = 1
) -> Tensor:
    """Return each head's share of blocks [heads] so that the mean is `target` and errors are least.

    `density` [D] rising and `error` [heads, D] are the measured curves. Each head gets a whole
    number of its `num_blocks` columns, at least `floor`; the next block always goes where the
    convex hull of its curve falls most, so no other allocation of hull points is better.
    """
    heads = error.shape[0]
    counts = torch.arange(floor, num_blocks + 1, dtype=torch.float64)
    curves = torch.stack([_on_hull(density, e, counts / num_blocks) for e in error])
    gains = (curves[:, :-1] - curves[:, 1:]).flatten()  # falling along each head
    spare = round(target * num_blocks * heads) - floor * heads
    order = gains.argsort(descending=True, stable=True)[: max(spare, 0)]
    given = torch.bincount(order // (len(counts) - 1), minlength=heads)
    return (given + floor) / num_blocks


def _on_hull(density: Tensor, error: Tensor, at: Tensor) -> Tensor:
    """Interpolate the lower convex hull of a falling curve that ends at error 0, density 1."""
    points = [(0.0, _at_zero(density, error))]
    points += [(float(d), float(e)) for d, e in zip(density, error.cummin(0)[0], strict=True)]
    if points[-1][0] < 1:
        points.append((1.0, 0.0))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*hull, strict=True))
    right = torch.searchsorted(x, at.clamp(max=1.0)).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _at_zero(density: Tensor, error: Tensor) -> float:
    """Extend the curve's first slope to density 0, so that the floor is never free."""
    slope = (error[0] - error[1]) / (density[1] - density[0])
    return float(error[0] + slope.clamp(min=0) * density[0])


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
