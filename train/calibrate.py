"""Calibration: run the dense teacher on a few samples and give each head its own budget.

First the error of every head at several budgets and what each budget costs in token pairs; then an
allocation (sparse/allocation.py) gives the blocks out; at last the sparse model itself is run.
Budgets are Top-k: a share of Top-p had no less error at equal density and drifts on other clips.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.sparse.allocation import (
    Allocation,
    ErrorBound,
    Fixed,
    Measure,
    OneMass,
    choose_layouts,
    give_out,
)
from gossamer.sparse.layouts.clusters import Clusters
from gossamer.sparse.layouts.per_head import CLUSTERS, PerHead
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.token_share import TokenHybrid
from gossamer.train.calibration import Calibration
from gossamer.train.check_masks import check_allocation
from gossamer.train.error_bound import within_bounds
from gossamer.train.gauge import Gauge
from gossamer.train.measured import Measured, Outcome
from gossamer.train.refusal import Refusal

BISECTIONS = 10  # of the density for an error budget
P_BISECTIONS = 12  # of one p for all heads
VELOCITY = ("velocity", "velocity_exact")
CORRECTIONS = 8  # of all k together, where a policy does not count blocks
CLOSE = 1e-3  # of the planned density to the one asked for
WITHIN = 1.2  # of the error in clusters, what a static order may have


@dataclass(frozen=True)
class Budgets:
    """k and p [L, H] of every head, the density that they are for, and why they were chosen."""

    k: Tensor
    p: Tensor
    density: float
    chosen: dict[str, Any]


class Calibrator:
    """Gives the heads of a densely attached teacher budgets.

    What was measured is kept, so that several budgets of one teacher cost one measurement.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge, self.method = gauge, gauge.method

    def run(
        self,
        allocation: Allocation,
        *,
        sparsity: float | None = None,
        error_budget: float | None = None,
    ) -> Calibration:
        """Return the budgets that `budgets` finds, with what they do to the teacher."""
        start = time.monotonic()
        found = self.budgets(allocation, sparsity=sparsity, error_budget=error_budget)
        measure, chosen = allocation.measure, dict(found.chosen)
        is_bound = isinstance(allocation, ErrorBound)
        curves = self.gauge.curves(measure) if measure and not is_bound else None
        outcome = self.gauge.outcome(found.k, found.p, measure)
        planned = outcome.density
        if isinstance(allocation, OneMass):  # what was bisected
            planned = self.gauge.sparse_density(found.k, found.p)
        if measure in VELOCITY:
            chosen["predicted_error"] = float(outcome.error.mean(2).sum().sqrt())
        chosen |= self._describe(outcome) | {"is_fixed": isinstance(allocation, Fixed)}
        chosen["measured_error"] = _rounded(self.gauge.sparse_error(found.k, found.p))
        return Calibration(
            layers=self.gauge.layers,
            num_heads=self.gauge.heads,
            noise_levels=self.gauge.noise_levels,
            target_density=found.density,
            planned_density=float(planned.mean()),
            k=found.k.tolist(),
            p=found.p.tolist(),
            captured_mass=_rounded(outcome.mass),
            layout_choice=self.gauge.choice,
            skip_below=_rounded(limit) if (limit := self.gauge.skip_below) is not None else [],
            measure=measure,
            error=_rounded(outcome.error) if measure else [],
            curve_densities=(curves.points / curves.num_blocks).tolist() if curves else [],
            curve_error=_rounded(curves.error) if curves else [],
            map_bound=_rounded(outcome.bound),
            chosen=chosen,
            clips=self.gauge.clips,
            seconds=time.monotonic() - start,
        )

    def budgets(
        self,
        allocation: Allocation,
        *,
        sparsity: float | None = None,
        error_budget: float | None = None,
    ) -> Budgets:
        """Return budgets of a sparsity, or of a relative velocity error: one of them is given.

        An error budget is met by bisection of the density, running the sparse model at each step,
        because the errors of single heads predict that of all only roughly.
        Raises Refusal for what the allocation cannot meet (check_allocation), and for a sparsity
        that leaves a row no block.
        """
        check_allocation(allocation, self.method.policy, error_budget)
        self.gauge.untune()
        target = 1 - (sparsity or 0.0)
        chosen: dict[str, Any] = {}
        if isinstance(self.method.layout, PerHead):
            chosen |= self._choose_orders(self.method.layout, allocation.measure, target)
        if isinstance(allocation, Fixed):
            shape = len(self.gauge.layers), self.gauge.heads
            k, p = (x.cpu().expand(shape) for x in (self.method.policy.k, self.method.policy.p))
        elif isinstance(allocation, ErrorBound):
            k, p = within_bounds(self.gauge, allocation)
            chosen |= {"l1": allocation.l1, "l2": allocation.l2}
        elif isinstance(allocation, OneMass):
            k, p = self._one_mass(allocation.k, target)
        else:
            found = self.gauge.curves(allocation.measure)
            worth = allocation.worth(found.curves)
            if error_budget is not None:
                target = self._density_of(error_budget, worth, found)
            k = self._budgets(worth, found, target)
            if not self.method.policy.counts_blocks:
                if error_budget is None:
                    k = self._met(worth, found, target)
                else:
                    target = float(self.gauge.density(k).mean())
            p = torch.zeros_like(k)
            if allocation.measure is not None:
                chosen["bound"] = give_out(worth, found.density.flatten(0, 1), target=target)[1]
        return Budgets(k, p, target, chosen)

    def _one_mass(self, k: float, target: float) -> tuple[Tensor, Tensor]:
        """Return k and the largest p of all heads whose mean density is at most the target.

        The density is that of the sparse model, which is also the cheaper one to run.
        """
        floor = torch.full((len(self.gauge.layers), self.gauge.heads), k)
        low, high = 0.0, 1.0
        if float(self.gauge.sparse_density(floor, torch.zeros_like(floor)).mean()) > target + CLOSE:
            raise Refusal(
                "allocation.k",
                k,
                f"a share below the density asked for, {target:.4g}",
                "lower allocation.k or sparsity",
            )
        for _ in range(P_BISECTIONS):
            middle = (low + high) / 2
            every = torch.full_like(floor, middle)
            density = float(self.gauge.sparse_density(floor, every).mean())
            low, high = (low, middle) if density > target else (middle, high)
        return floor, torch.full_like(floor, low)

    def _choose_orders(
        self, layout: PerHead, measure: Measure | None, target: float
    ) -> dict[str, Any]:
        """Give each head the best static order that is close to clusters, else clusters.

        Errors are compared near the target density; clusters that are none of the layout's orders
        are only the yardstick, and a head that no order brings close takes the best one.
        An allocation without a measure, and a density that is not known yet (an error budget),
        compare the layer's output, and the middle of the curve.
        """
        names = layout.with_clusters().names
        clusters = names.index(CLUSTERS)
        errors = []
        for found in self.gauge.curves_by_order(measure or "output", len(names)):
            shares = found.points / found.num_blocks
            at = int((shares - target).abs().argmin()) if target < 1 else len(shares) // 2
            errors.append(found.error.mean(2)[..., at].flatten())
        error = torch.stack(errors)
        cost = torch.zeros(len(names))
        cost[clusters] = 1  # k-means at run time
        best = choose_layouts(error, cost, reference=clusters, within=WITHIN)
        is_far = best == clusters
        if CLUSTERS not in layout.names:
            best = torch.where(is_far, error[:clusters].argmin(0), best)
        self.gauge.choice = best.view(len(self.gauge.layers), self.gauge.heads).tolist()
        taken = error.gather(0, best[None])[0]
        over = taken.clamp(min=1e-30) / error[clusters].clamp(min=1e-30)
        return {
            "heads_by_order": {n: int((best == i).sum()) for i, n in enumerate(layout.names)},
            "within": WITHIN,
            "over_clusters": [float(over.median()), float(over.max())],
            "far_from_clusters": int(is_far.sum()),
            "clusters_allowed": CLUSTERS in layout.names,
        }

    def _density_of(self, error_budget: float, worth: Tensor, found: Measured) -> float:
        """Bisect the least density whose sparse model, by Top-k alone, meets the error budget."""
        low, high = float(found.density[..., 0].mean()), 1.0

        def meets(density: float) -> bool:
            k = self._budgets(worth, found, density)
            return float(self.gauge.sparse_error(k, torch.zeros_like(k)).mean()) <= error_budget

        if meets(low):
            return low
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _budgets(self, worth: Tensor, found: Measured, target: float) -> Tensor:
        """Return each head's share of blocks [L, H]; Refusal where a block a row is too much."""
        least = float(found.density[..., 0].mean())
        if least > target + 1 / (found.density.numel() * 2):
            raise Refusal(
                "sparsity",
                f"{1 - target:.6g}",
                f"at most {1 - least:.4f} with {found.num_blocks} blocks a row (one must stay)",
                "lower it or make the blocks smaller",
            )
        counts, _ = give_out(worth, found.density.flatten(0, 1), target=max(target, least))
        return (counts.view(found.density.shape[:2]) / found.num_blocks).float()

    def _met(self, worth: Tensor, found: Measured, target: float) -> Tensor:
        """Return k [L, H] whose masks have the target density, measured; Refusal if none has.

        In token pairs all k are scaled alike. In blocks a whole one goes to or from a head, until
        less than a block of one head is missing.
        """
        counts_pairs, num_heads = _counts_pairs(self.method.policy), worth.shape[0]
        close = CLOSE if counts_pairs else max(CLOSE, 1 / (found.num_blocks * num_heads))
        start = self._budgets(worth, found, target)
        aim, best, nearest = target, start, math.inf
        for _ in range(CORRECTIONS):
            k = start * (aim / target) if counts_pairs else self._budgets(worth, found, aim)
            k = k.clamp(max=1)
            density = float(self.gauge.density(k).mean())
            if abs(density - target) < abs(nearest - target):
                best, nearest = k, density
            if abs(density - target) < close / 10:
                break
            aim = aim * target / density if counts_pairs else max(aim + target - density, 1e-6)
        if abs(nearest - target) > close:
            raise Refusal(
                "sparsity",
                f"{1 - target:.6g}",
                f"what these masks can have; the nearest is {1 - nearest:.4f}",
                "ask for that, or make the layout's blocks smaller",
            )
        return best

    def _describe(self, outcome: Outcome) -> dict[str, Any]:
        """Return the figures that say what was chosen."""
        layout, grid = self.method.layout, self.gauge.grid
        facts: dict[str, Any] = {
            "lowest_density": float(outcome.density.min()),
            "highest_density": float(outcome.density.max()),
            "counts": "token pairs" if _counts_pairs(self.method.policy) else "blocks of a row",
            "layout": type(layout).__name__,
            "blocks": list(layout.num_blocks(grid)),
            "block_shape": layout.block_shape and list(layout.block_shape),
            "video_tokens": grid.num_video,
        }
        if isinstance(layout, Clusters):
            facts["clusters"] = list(layout.counts(grid))
            facts["clusters_given"] = [layout.num_q is not None, layout.num_kv is not None]
            facts["keep_until"] = layout.keep_until
        if outcome.error.any():
            by_level = outcome.error.sum((0, 1))
            facts["level_ratio"] = float(by_level.max() / by_level.min().clamp(min=1e-30))
        return facts


def _counts_pairs(policy: Hybrid) -> bool:
    return isinstance(policy, TokenHybrid) or getattr(policy, "unit", "blocks") == "tokens"


def _rounded(x: Tensor) -> Any:
    """Return nested lists of six significant digits, for a small file."""

    def of(value: Any) -> Any:
        return [of(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")

    return of(x.tolist())
