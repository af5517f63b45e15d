"""Calibration: run the dense teacher on a few samples and give each head its own budget.

First the error of every head at several budgets and what each budget costs in token pairs; then an
allocation (sparse/allocation.py) gives the blocks out; then each head's budget is split between
Top-k and Top-p as measures best; at last the sparse model itself is run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.allocation import (
    Allocation,
    Curves,
    Fixed,
    Measure,
    OneMass,
    choose_layouts,
    coverage,
    give_out,
)
from gossamer.sparse.attach import attach, attentions, detach
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.policies import Hybrid
from gossamer.train.calibration import Calibration, set_masks
from gossamer.train.measures import Layer, Sample, visit_layers
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal

ROWS_KEPT = 128  # score rows a layer and sample kept to find p
BISECTIONS = 10  # of the density for an error budget
VELOCITY = ("velocity", "velocity_exact")
Split = tuple[Tensor, Tensor]  # k and p of every layer and head [L, H]


@dataclass
class _Rows:
    """Some score rows of one layer: falling scores and coverage [H, R, Nk], weights [H, R]."""

    ordered: list[Tensor] = field(default_factory=list)
    covered: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)

    def keep(self, ordered: Tensor, covered: Tensor, weight: Tensor) -> None:
        """Keep evenly spaced rows of [B, H, Nq, Nk]; weight [B, H, Nq]."""
        step = max(1, ordered.shape[2] // ROWS_KEPT)
        for kept, x in ((self.ordered, ordered), (self.covered, covered)):
            kept.append(x[:, :, ::step].transpose(0, 1).flatten(1, 2).float().cpu())
        self.weight.append(weight[:, :, ::step].transpose(0, 1).flatten(1).cpu())

    def density_of(self, *, keep_crossing: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the rows' mean density [H] as a function of k and p [H]."""
        ordered, covered = torch.cat(self.ordered, 1), torch.cat(self.covered, 1)
        weight = torch.cat(self.weight, 1)
        weight = weight / weight.sum(1, keepdim=True)
        mass = ordered.cumsum(-1)
        reached = mass - ordered if keep_crossing else mass.nextafter(torch.tensor(-1.0))

        def density(k: Tensor, p: Tensor) -> Tensor:
            floor = (k * ordered.shape[-1]).round().clamp(min=1).long()[:, None]
            count = (reached < p[:, None, None]).sum(-1).maximum(floor)  # [H, R]
            kept = covered.gather(-1, count[..., None] - 1)[..., 0].double()
            return (kept * weight).sum(1)

        return density

    def fit_p(self, k: Tensor, density: Tensor, *, keep_crossing: bool) -> Tensor:
        """Bisect p [H] so that the rows' mean density is `density` [H], with k [H] as a floor."""
        density_of = self.density_of(keep_crossing=keep_crossing)
        return _bisect(torch.zeros_like(k), lambda p: density_of(k, p) > density)


@dataclass(frozen=True)
class _Measured:
    """Curves of every head: error [L, H, T, D] at points [D], density [L, H, N]; rows by layer."""

    points: Tensor
    error: Tensor
    density: Tensor
    rows: list[_Rows]

    @property
    def num_blocks(self) -> int:
        return self.density.shape[2]

    @property
    def curves(self) -> Curves:
        """Return the curves with heads flattened, errors averaged over noise levels."""
        error = self.error.mean(2).flatten(0, 1)
        return Curves(self.density.flatten(0, 1), self.points, error)


@dataclass(frozen=True)
class _Outcome:
    """What the chosen budgets do: k, p, split, density [L, H], error and mass [L, H, T]."""

    k: Tensor
    p: Tensor
    split: Tensor
    density: Tensor
    error: Tensor
    mass: Tensor


class Calibrator:
    """Measures a teacher that is attached densely, and gives its heads budgets.

    `densities` are shares of blocks at which errors are measured. What was measured is kept, so
    that several budgets of one teacher cost one measurement. The teacher stays attached densely;
    a measure that needs gradients holds one backward pass of it in memory.
    """

    def __init__(
        self,
        teacher: nn.Module,
        method: SparseMethod,
        samples: list[Sample],
        *,
        noise_levels: list[float],
        densities: list[float],
        probes: int,
        seed: int,
    ) -> None:
        self.teacher, self.method, self.samples = teacher, method, samples
        self.noise_levels, self.densities = noise_levels, densities
        self.probes, self.seed = probes, seed
        self.layers = list(attentions(teacher))
        self.heads = int(teacher.config.num_attention_heads)  # type: ignore[arg-type]
        counts = [sum(len(s.t) for s in samples if s.level == i) for i in range(len(noise_levels))]
        self._per_level = torch.tensor(counts, dtype=torch.float64)
        self._found: dict[Any, _Measured] = {}
        self._choice: list[list[int]] = []  # each layer's and head's order, of a layout with orders
        width = int(teacher.config.attention_head_dim)  # type: ignore[arg-type]
        self._sparse = [
            SparseAttention(method, self.heads, width).requires_grad_(False).to(samples[0].x.device)
            for _ in self.layers
        ]

    def run(
        self,
        allocation: Allocation,
        *,
        sparsity: float | None = None,
        error_budget: float | None = None,
    ) -> Calibration:
        """Return budgets of a sparsity, or of a relative velocity error: one of them is given.

        An error budget is met by bisection of the density, running the sparse model at each step,
        because the errors of single heads predict that of all only roughly.
        Raises Refusal for an error budget where the policy's own k and p decide, and ValueError for
        a sparsity that leaves a row no block.
        """
        start = time.monotonic()
        target = 1 - (sparsity or 0.0)
        chosen: dict[str, Any] = {}
        if isinstance(self.method.layout, PerHead):
            chosen |= self._choose_orders(self.method.layout.names, allocation.measure, target)
        curve_densities: list[float] = []
        curve_error: Any = []
        if isinstance(allocation, Fixed):
            if error_budget is not None:
                raise Refusal(
                    "error_budget",
                    error_budget,
                    "null with allocation=fixed, where the policy's own k and p decide",
                    "choose another allocation, or give sparsity instead",
                )
            k, p = self.method.policy.k.cpu(), self.method.policy.p.cpu()
            shape = len(self.layers), self.heads
            splits = [(k.expand(shape), p.expand(shape))]
        elif isinstance(allocation, OneMass):
            splits = [self._one_mass(allocation.k, target, error_budget)]
        else:
            found = self._measure(allocation.measure, keep_rows=len(allocation.splits) > 1)
            worth = allocation.worth(found.curves)
            if error_budget is not None:
                target = self._density_of(error_budget, worth, found)
            counts, bound = self._give_out(worth, found, target)
            splits = self._splits(found, counts, allocation.splits)
            if allocation.measure is not None:
                chosen["bound"] = bound
            curve_densities = (found.points / found.num_blocks).tolist()
            curve_error = _rounded(found.error)
        outcome = self._try(splits, allocation.measure)
        if allocation.measure in VELOCITY:
            chosen["predicted_error"] = float(outcome.error.mean(2).sum().sqrt())
        planned = float(outcome.density.mean())
        result = Calibration(
            layers=self.layers,
            num_heads=self.heads,
            noise_levels=self.noise_levels,
            target_density=target,
            planned_density=planned,
            k=outcome.k.tolist(),
            p=outcome.p.tolist(),
            captured_mass=_rounded(outcome.mass),
            layout_choice=self._choice,
            measure=allocation.measure,
            error=_rounded(outcome.error) if allocation.measure else [],
            curve_densities=curve_densities if allocation.measure else [],
            curve_error=curve_error if allocation.measure else [],
            chosen=chosen | _describe(allocation, outcome),
            clips=int(self._per_level[0]),
            seconds=0.0,
        )
        result.chosen["measured_error"] = _rounded(self._sparse_error(outcome.k, outcome.p))
        return replace(result, seconds=time.monotonic() - start)

    def _one_mass(self, k: float, target: float, error_budget: float | None) -> Split:
        """Return k and the p of all heads whose mean density on the samples is the target."""
        if error_budget is not None:
            raise Refusal(
                "error_budget",
                error_budget,
                "null with allocation=one_mass, which meets a density",
                "choose another allocation, or give sparsity instead",
            )
        found = self._measure(None, keep_rows=True)
        crossing = self.method.policy.keep_crossing
        of_layers = [rows.density_of(keep_crossing=crossing) for rows in found.rows]
        floor = torch.full((self.heads,), k)

        def too_many(p: Tensor) -> Tensor:
            every = p.expand(self.heads)
            return torch.stack([density(floor, every) for density in of_layers]).mean() > target

        if bool(too_many(torch.zeros(1))):
            raise Refusal(
                "allocation.k",
                k,
                f"a share below the density asked for, {target:.4g}",
                "lower allocation.k or sparsity",
            )
        p = _bisect(torch.zeros(1), too_many)
        shape = len(self.layers), self.heads
        return floor.expand(shape), p.expand(shape)

    def _choose_orders(
        self, names: tuple[str, ...], measure: Measure | None, target: float
    ) -> dict[str, Any]:
        """Give each head the order with the least error near the target; say how many took each.

        An allocation without a measure, and a density that is not known yet (an error budget),
        compare the layer's output, and the middle of the curve.
        """
        errors = []
        for order in range(len(names)):
            self._choice = [[order] * self.heads for _ in self.layers]
            self._arrange()
            found = self._measure(measure or "output", keep_rows=False)
            shares = found.points / found.num_blocks
            at = int((shares - target).abs().argmin()) if target < 1 else len(shares) // 2
            errors.append(found.error.mean(2)[..., at].flatten())
        best = choose_layouts(torch.stack(errors), torch.zeros(len(names)), reference=0)
        self._choice = best.view(len(self.layers), self.heads).tolist()
        self._arrange()
        return {"heads_by_order": {n: int((best == i).sum()) for i, n in enumerate(names)}}

    def _arrange(self) -> None:
        for attention, choice in zip(self._sparse, self._choice, strict=True):
            attention.layout.set_choice(torch.tensor(choice))

    def _density_of(self, error_budget: float, worth: Tensor, found: _Measured) -> float:
        """Bisect the least density whose sparse model, by Top-k alone, meets the error budget."""
        low, high = float(found.density[..., 0].mean()), 1.0

        def meets(density: float) -> bool:
            k, p = self._splits(found, self._give_out(worth, found, density)[0], (1.0,))[0]
            return float(self._sparse_error(k, p).mean()) <= error_budget

        if meets(low):
            return low
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _give_out(self, worth: Tensor, found: _Measured, target: float) -> tuple[Tensor, float]:
        """Return each head's number of blocks [L, H], and the bound that decided it."""
        counts, bound = give_out(worth, found.density.flatten(0, 1), target=target)
        return counts.view(len(self.layers), self.heads), bound

    def _measure(self, measure: Measure | None, *, keep_rows: bool) -> _Measured:
        """Measure every head's error at each of the densities, and what each budget costs."""
        key = measure, keep_rows, str(self._choice)
        if key in self._found:
            return self._found[key]
        rows = [_Rows() for _ in self.layers]
        points = density = error = torch.zeros(0)

        def visit(sample: Sample, layer: Layer) -> None:
            nonlocal points, density, error
            ordered, covered = coverage(layer.scores)
            num_blocks = covered.shape[3]
            if not len(points):
                shares = torch.tensor(self.densities, dtype=torch.float64)
                points = (shares * num_blocks).round().clamp(1, num_blocks).long().unique()
                density = self._zeros(num_blocks)
                error = self._zeros(len(self.noise_levels), len(points))
            sizes = layer.scores.q_layout.sizes.double()
            weight = (sizes / sizes.sum(-1, keepdim=True)).expand(covered.shape[:3])
            density[layer.index] += torch.einsum("bhqk,bhq->hk", covered, weight).cpu()
            if keep_rows:
                rows[layer.index].keep(ordered, covered, weight)
            for d, point in enumerate(points.tolist() if measure else []):
                policy = self._policy(layer, torch.full((self.heads,), point / num_blocks))
                effect = layer.error(layer.mask(policy))
                error[layer.index, :, sample.level, d] += effect.sum(0)

        self._visit(visit, measure, f"calibrate {measure or 'density'}")
        error /= self._per_level[:, None]
        density /= self._per_level.sum()
        found = _Measured(points, error, density, rows)
        self._found[key] = found
        return found

    def _try(self, splits: list[Split], measure: Measure | None) -> _Outcome:
        """Measure every split of the budgets and keep each head's best."""
        error = self._zeros(len(splits), len(self.noise_levels))
        mass, density = torch.zeros_like(error), torch.zeros_like(error)

        def visit(sample: Sample, layer: Layer) -> None:
            for i, (k, p) in enumerate(splits):
                policy = self._policy(layer, k[layer.index], p[layer.index])
                mask = layer.mask(policy)
                place = (layer.index, slice(None), i, sample.level)
                density[place] += mask.density.cpu().sum(0)
                mass[place] += mask.captured(layer.mass).double().cpu().sum(0)
                if measure is not None:
                    error[place] += layer.error(mask).sum(0)

        self._visit(visit, measure, "calibrate masks")
        split = error.sum(-1).argmin(2)  # [L, H]
        k, p = (torch.stack(x, 2) for x in zip(*splits, strict=True))

        def best(x: Tensor) -> Tensor:
            at = split.view(*split.shape, 1, *[1] * (x.ndim - 3))
            return x.gather(2, at.expand(-1, -1, 1, *x.shape[3:])).squeeze(2)

        return _Outcome(
            k=best(k),
            p=best(p),
            split=split,
            density=best(density).sum(-1) / self._per_level.sum(),
            error=best(error) / self._per_level,
            mass=best(mass) / self._per_level,
        )

    def _sparse_error(self, k: Tensor, p: Tensor) -> Tensor:
        """Return the sparse model's relative velocity error by noise level, all heads at once."""
        errors = torch.zeros(len(self.noise_levels), dtype=torch.float64)
        dense = self._dense
        detach(self.teacher)
        attach(self.teacher, self.method)
        try:
            set_masks(self.teacher, k, p, self._choice)
            for sample, v in zip(self.samples, dense, strict=True):
                change = self._velocity(sample) - v
                ratio = change.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
                errors[sample.level] += ratio.double().cpu().sum()
        finally:
            detach(self.teacher)
            attach(self.teacher, None)
        return errors / self._per_level

    @cached_property
    def _dense(self) -> list[Tensor]:
        return [self._velocity(sample) for sample in self.samples]

    @torch.no_grad()
    def _velocity(self, sample: Sample) -> Tensor:
        return velocity(self.teacher, sample.x, sample.t, sample.text, sample.condition)

    def _visit(
        self, visit: Callable[[Sample, Layer], None], measure: Measure | None, title: str
    ) -> None:
        visit_layers(
            self.teacher,
            self._sparse,
            self.samples,
            visit,
            measure=measure,
            probes=self.probes,
            seed=self.seed,
            title=title,
        )

    def _splits(
        self, found: _Measured, counts: Tensor, top_k_shares: tuple[float, ...]
    ) -> list[Split]:
        """Split each head's blocks [L, H]: a share of them as k, and p so that the density fits."""
        density = found.density.gather(2, counts[..., None] - 1)[..., 0]
        splits = []
        for top_k in top_k_shares:
            k = (counts / found.num_blocks * top_k).float()
            p = torch.zeros_like(k)
            if top_k < 1:
                fits = zip(found.rows, k, density, strict=True)
                crossing = self.method.policy.keep_crossing
                p = torch.stack([r.fit_p(floor, d, keep_crossing=crossing) for r, floor, d in fits])
            splits.append((k, p))
        return splits

    def _policy(self, layer: Layer, k: Tensor, p: Tensor | None = None) -> Hybrid:
        policy = layer.attention.policy
        policy.set_budget(k, torch.zeros_like(k) if p is None else p)
        return policy

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.layers), self.heads, *shape, dtype=torch.float64)


def _bisect(low: Tensor, too_much: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the largest numbers from `low` to 1 of which none is too much."""
    high = torch.ones_like(low)
    for _ in range(30):
        middle = (low + high) / 2
        over = too_much(middle)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return low


def _describe(allocation: Allocation, outcome: _Outcome) -> dict[str, Any]:
    """Return the figures that say what was chosen."""
    facts: dict[str, Any] = {
        "lowest_density": float(outcome.density.min()),
        "highest_density": float(outcome.density.max()),
        "heads_by_top_k_share": {
            str(share): int((outcome.split == i).sum()) for i, share in enumerate(allocation.splits)
        },
    }
    if allocation.measure is not None:
        by_level = outcome.error.sum((0, 1))
        facts["level_ratio"] = float(by_level.max() / by_level.min().clamp(min=1e-30))
    return facts


def _rounded(x: Tensor) -> Any:
    """Return nested lists of six significant digits, for a small file."""

    def of(value: Any) -> Any:
        return [of(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")

    return of(x.tolist())
