"""Budgets for each head from measured curves: which head is given the next key block.

Every rule says what the next block of each head is worth, and blocks are given out in falling order
of worth until the budget is used: one number, the worth of the last block, decides all budgets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from gossamer.sparse.mask import BlockScores, text_pairs

Measure = Literal["mass", "relative_l1", "output", "fisher", "velocity", "velocity_exact"]


@dataclass(frozen=True)
class Curves:
    """What a head's budget costs, and the error it leaves.

    `density` [H, N] is the share of token pairs computed exactly when each row keeps its best
    1, 2 ... N blocks; `error` [H, D] was measured at `points` [D], rising numbers of blocks.
    """

    density: Tensor
    points: Tensor
    error: Tensor


class Allocation(Protocol):
    """A rule for the budgets, and the error it needs measured (None: no error at all)."""

    measure: Measure | None

    def worth(self, curves: Curves) -> Tensor:
        """Return what the next block is worth [H, N - 1]; it never rises along a head."""


class Uniform:
    """The same budget for every head, within one block."""

    measure: Measure | None = None

    def worth(self, curves: Curves) -> Tensor:
        rank = torch.arange(1, curves.density.shape[1], dtype=torch.float64)
        return -rank.expand(len(curves.density), -1)


class OneMass:
    """One k and one p for all heads: k as given, p as large as the density allows.

    The rule of published recipes (SpargeAttention2, k = 0.03). The density of p drifts with the
    data, so it is met on the calibration samples only.
    """

    measure: Measure | None = None

    def __init__(self, *, k: float = 0.03) -> None:
        if not 0 <= k < 1:
            raise ValueError(f"k={k}: allowed is a share from 0 to below 1; e.g. k=0.03")
        self.k = k

    def worth(self, curves: Curves) -> Tensor:
        raise ValueError("allocation=one_mass: its budget is one mass; choose another allocation")


class EqualError:
    """The smallest budget of each head whose error is below one bound for all heads.

    The bound is the one that meets the sparsity. With the captured attention mass it is a quantile
    of the scores (SVOO, arXiv 2603.18636).
    """

    measure: Measure | None

    def __init__(self, *, measure: Measure = "relative_l1") -> None:
        self.measure = _known(measure)

    def worth(self, curves: Curves) -> Tensor:
        knots = _all_knots(curves, _falling)
        left = [_interpolate(*xy, d) for xy, d in zip(knots, curves.density, strict=True)]
        return torch.stack(left)[:, :-1].cummin(1)[0]


class WaterFill:
    """The least sum of errors: each block goes where the error falls most.

    The error should add up over heads, as squared errors of the velocity do to first order. Between
    the points of the curve's hull it is taken to fall as a power of the density: along lines it
    would fall evenly, and every budget be one of the few densities that were measured.
    """

    measure: Measure | None

    def __init__(self, *, measure: Measure = "velocity") -> None:
        self.measure = _known(measure)

    def worth(self, curves: Curves) -> Tensor:
        worth = []
        for density, knots in zip(curves.density, _all_knots(curves, _hull), strict=True):
            worth.append(_fall(*knots, (density[:-1] + density[1:]) / 2))
        return torch.stack(worth).cummin(1)[0]


class Fixed:
    """No choice: every head keeps the policy's own k and p, as published recipes do."""

    measure: Measure | None = None

    def worth(self, curves: Curves) -> Tensor:
        raise ValueError("allocation=fixed: it has no budget to give; choose another allocation")


class ErrorBound:
    """Each head's least mass p at which no clip's relative L1 error of its output exceeds l1.

    SpargeAttention's tuning (arXiv 2502.18137, section 3.6), by bisection; the policy's k stays,
    and the sparsity is what comes of it. Where the compensation is FilteredDrop its gap follows, of
    the same head: the least that keeps the error within l2.
    """

    measure: Measure | None = "relative_l1"

    def __init__(self, *, l1: float = 0.05, l2: float = 0.06) -> None:
        if not 0 <= l1 <= l2:
            raise ValueError(f"l1={l1}, l2={l2}: allowed is 0 <= l1 <= l2; e.g. 0.05 and 0.06")
        self.l1, self.l2 = l1, l2

    def worth(self, curves: Curves) -> Tensor:
        raise ValueError("allocation=error_bound: it has no budget to give; choose another one")


def least_within(
    error: Callable[[Tensor], Tensor], bound: float, *, like: Tensor, most: float, steps: int
) -> Tensor:
    """Bisect from 0 to `most` for the least values, shaped as `like`, whose errors are in bounds.

    `error` falls in each value on its own; where even `most` is out of bounds, it is what is found.
    """
    high = torch.full_like(like, most)
    low = torch.zeros_like(high)
    for _ in range(steps):
        middle = (low + high) / 2
        is_in = error(middle) <= bound
        low, high = torch.where(is_in, low, middle), torch.where(is_in, middle, high)
    return high


def give_out(worth: Tensor, density: Tensor, *, target: float) -> tuple[Tensor, float]:
    """Return the blocks of each head [H] whose mean density is nearest to target, and the bound.

    The bound is the worth of the last block given, 0 where heads have one block only. Raises
    ValueError when one block a row is already more than the target.
    """
    order = worth.flatten().argsort(descending=True, stable=True)
    cost = density.diff(dim=1).flatten()[order]
    spent = torch.cat([density[:, 0].sum()[None], cost]).cumsum(0) / len(density)
    step = float(1 / density.numel())
    if spent[0] > target + step / 2:
        raise ValueError(
            f"sparsity={1 - target:.6g}: allowed is at most {1 - float(spent[0]):.4f} with "
            f"{density.shape[1]} blocks a row (one must stay); lower it or make the blocks smaller"
        )
    given = int((spent - target).abs().argmin())
    counts = 1 + torch.bincount(order[:given] // worth.shape[1], minlength=len(worth))
    return counts, float(worth.flatten()[order[max(given - 1, 0)]]) if len(order) else 0.0


def coverage(scores: BlockScores) -> tuple[Tensor, Tensor]:
    """Return scores in falling order, and the share of keys that each row's best blocks hold.

    Both [B, H, Nq, Nk], the latter fp64 for 1, 2 ... Nk blocks. Blocks of text and those that the
    estimator forces always count.
    """
    score = scores.score.float()
    score = score.masked_fill(score.isnan(), torch.inf)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)
    sizes = scores.kv_layout.sizes.double()[..., None, :]  # [1, Nk] or [B, H, 1, Nk]
    always = torch.zeros_like(score, dtype=torch.bool)
    if scores.forced is not None:
        always |= scores.forced
    text = text_pairs(scores.q_layout, scores.kv_layout)
    if text is not None:
        always |= text
    own = torch.where(always, 0, sizes)
    fixed = torch.where(always, sizes, 0).sum(-1, keepdim=True)
    return ordered, (own.gather(-1, order).cumsum(-1) + fixed) / sizes.sum(-1, keepdim=True)


def choose_layouts(error: Tensor, cost: Tensor, *, reference: int, within: float = 1.2) -> Tensor:
    """Return each head's cheapest layout [H] whose error is within a factor of the reference's.

    `error` [C, H] is that of each candidate at the same budget, `cost` [C] what it takes at run
    time; the reference is the candidate with the most freedom (clusters). Of candidates that cost
    the same the one with the least error is taken (spec: training-free, 10.8).
    """
    if error.ndim != 2 or cost.shape != error.shape[:1] or not bool(error.isfinite().all()):
        raise ValueError(
            f"error={list(error.shape)}, cost={list(cost.shape)}: allowed is finite errors "
            "[candidates, heads] and one cost a candidate; measure every candidate"
        )
    is_close = error <= within * error[reference]
    is_close[reference] = True
    price = torch.where(is_close, cost[:, None].to(error.dtype), torch.inf)
    is_cheapest = is_close & (price == price.min(0)[0])
    return torch.where(is_cheapest, error, torch.inf).argmin(0)


def _known(measure: Measure) -> Measure:
    if measure not in get_args(Measure):
        allowed = ", ".join(get_args(Measure))
        raise ValueError(f"measure={measure}: allowed is {allowed}; choose one of them")
    return measure


Knots = tuple[Tensor, Tensor]  # rising densities and the errors there


def _all_knots(curves: Curves, shape: Any) -> list[Knots]:
    return [
        shape(_knots(density, curves.points, error))
        for density, error in zip(curves.density, curves.error, strict=True)
    ]


def _knots(density: Tensor, points: Tensor, error: Tensor) -> list[tuple[float, float]]:
    """Return the curve's points: falling, from one block (first slope) to no error at density 1."""
    at = density[points - 1]
    fallen = error.double().cummin(0)[0]
    found = dict(zip(at.tolist(), fallen.tolist(), strict=True))
    start = float(density[0])
    if start < float(at[0]):
        rise = (fallen[0] - fallen[-1]) if len(points) == 1 else (fallen[0] - fallen[1])
        run = at[1] - at[0] if len(points) > 1 else at[0]
        found[start] = float(fallen[0] + rise / run.clamp(min=1e-12) * (at[0] - start))
    if float(density[-1]) > float(at[-1]):
        found[float(density[-1])] = 0.0
    return sorted(found.items())


def _falling(points: list[tuple[float, float]]) -> Knots:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    return x, y


def _hull(points: list[tuple[float, float]]) -> Knots:
    """Keep the points of the lower convex hull."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return _falling(hull)


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    right = _right(x, at)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _fall(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Return how fast y falls: as a power of x between two points, evenly to one without error."""
    right = _right(x, at)
    (x0, y0), (x1, y1) = (x[right - 1], y[right - 1]), (x[right], y[right])
    power = (y0 / y1).log() / (x1 / x0).log()
    return torch.where(y1 > 0, y0 * (x0 / at) ** power * power / at, (y0 - y1) / (x1 - x0))


def _right(x: Tensor, at: Tensor) -> Tensor:
    """Return the end of the segment of x that holds each `at`."""
    return torch.searchsorted(x, at).clamp(1, len(x) - 1)


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
