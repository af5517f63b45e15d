"""What calibration measures on a dense teacher: error curves, densities, and what budgets do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.allocation import Curves, Measure, coverage
from gossamer.sparse.attach import attach, attentions, detach, family_of, transformer_of
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.bound import map_error
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.policies import Hybrid
from gossamer.train.calibration import set_masks
from gossamer.train.measures import Layer, Sample, visit_layers
from gossamer.train.model import velocity

BOUND_BLOCKS = 4  # q blocks of a head that Proposition 1 is evaluated on


@dataclass(frozen=True)
class Measured:
    """Curves of every head: error [L, H, T, D] at points [D], density [L, H, N]."""

    points: Tensor
    error: Tensor
    density: Tensor

    @property
    def num_blocks(self) -> int:
        return self.density.shape[2]

    @property
    def curves(self) -> Curves:
        """Return the curves with heads flattened, errors averaged over noise levels."""
        error = self.error.mean(2).flatten(0, 1)
        return Curves(self.density.flatten(0, 1), self.points, error)


@dataclass(frozen=True)
class Outcome:
    """What budgets do: density [L, H], error and mass [L, H, T], Proposition 1 by layer [L, 3]."""

    density: Tensor
    error: Tensor
    mass: Tensor
    bound: Tensor


class Gauge:
    """Measures a teacher that is attached densely, and leaves it so.

    `densities` are shares of blocks at which errors are measured. Curves once measured are kept.
    A measure that needs gradients holds one backward pass of the teacher in memory.
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
        self._found: dict[Any, Measured] = {}
        self.choice: list[list[int]] = []  # each layer's and head's order, of a layout with orders
        self.skip_below: Tensor | None = None  # [L, H], of a filter that was tuned
        if isinstance(method.layout, PerHead):  # clusters are what its orders are compared with
            method = replace(method, layout=method.layout.with_clusters())
        width = int(teacher.config.attention_head_dim)  # type: ignore[arg-type]
        self._sparse = [
            SparseAttention(method, self.heads, width).requires_grad_(False).to(samples[0].x.device)
            for _ in self.layers
        ]

    @property
    def clips(self) -> int:
        return int(self._per_level[0])

    @property
    def grid(self) -> TokenGrid:
        model = transformer_of(self.teacher)
        return family_of(model).token_grid(model, {"hidden_states": self.samples[0].x})

    def arrange(self, choice: list[list[int]]) -> None:
        """Let each layer's heads take these places in the layout's orders."""
        self.choice = choice
        for attention, of_layer in zip(self._sparse, choice, strict=True):
            attention.layout.set_choice(torch.tensor(of_layer))

    def filter(self, skip_below: Tensor) -> None:
        """Let the second filter of each layer and head have this limit, [L, H]."""
        self.skip_below = skip_below
        for attention, of_layer in zip(self._sparse, skip_below, strict=True):
            attention.compensation.set_limit(of_layer)

    def worst_error(self, k: Tensor, p: Tensor) -> Tensor:
        """Return each head's relative L1 error under k and p [L, H] on its worst clip, [L, H]."""
        error = self._zeros()

        def visit(sample: Sample, layer: Layer) -> None:
            mask = layer.mask(self._policy(layer, k[layer.index], p[layer.index]))
            error[layer.index] = torch.maximum(error[layer.index], layer.error(mask).amax(0))

        self._visit(visit, "relative_l1", "calibrate bound")
        return error

    def curves(self, measure: Measure | None) -> Measured:
        """Measure every head's error at each of the densities, and what each budget costs."""
        key = measure, str(self.choice)
        if key in self._found:
            return self._found[key]
        by_blocks = self.method.policy.counts_blocks
        points = density = costs = error = torch.zeros(0)

        def visit(sample: Sample, layer: Layer) -> None:
            nonlocal points, density, costs, error
            num_blocks = layer.scores.kv_layout.num_blocks
            if not len(points):
                points = self._points(num_blocks)
                density = self._zeros(num_blocks)
                costs = self._zeros(len(points))
                error = self._zeros(len(self.noise_levels), len(points))
            if by_blocks:
                covered = coverage(layer.scores)[1]
                sizes = layer.scores.q_layout.sizes.double()
                weight = (sizes / sizes.sum(-1, keepdim=True)).expand(covered.shape[:3])
                density[layer.index] += torch.einsum("bhqk,bhq->hk", covered, weight).cpu()
            for d, point in enumerate(points.tolist() if measure or not by_blocks else []):
                mask = layer.mask(
                    self._policy(layer, torch.full((self.heads,), point / num_blocks))
                )
                costs[layer.index, :, d] += mask.density.cpu().sum(0)
                if measure:
                    error[layer.index, :, sample.level, d] += layer.error(mask).sum(0)

        self._visit(visit, measure, f"calibrate {measure or 'density'}")
        error /= self._per_level[:, None]
        found = density if by_blocks else _between(points, costs, density.shape[2])
        measured = Measured(points, error, found / self._per_level.sum())
        self._found[key] = measured
        return measured

    def density(self, k: Tensor, p: Tensor | None = None) -> Tensor:
        """Return the density of each head's masks of k and p [L, H], meaned over the samples."""
        density = self._zeros()

        def visit(sample: Sample, layer: Layer) -> None:
            of_layer = None if p is None else p[layer.index]
            mask = layer.mask(self._policy(layer, k[layer.index], of_layer))
            density[layer.index] += mask.density.cpu().sum(0)

        self._visit(visit, None, "calibrate density")
        return density / self._per_level.sum()

    def outcome(self, k: Tensor, p: Tensor, measure: Measure | None) -> Outcome:
        """Measure the masks of k and p [L, H]."""
        error = self._zeros(len(self.noise_levels))
        mass, density = torch.zeros_like(error), self._zeros()
        bound = torch.zeros(len(self.layers), len(self.noise_levels), 3, dtype=torch.float64)

        def visit(sample: Sample, layer: Layer) -> None:
            mask = layer.mask(self._policy(layer, k[layer.index], p[layer.index]))
            place = (layer.index, slice(None), sample.level)
            density[layer.index] += mask.density.cpu().sum(0)
            mass[place] += mask.captured(layer.mass).double().cpu().sum(0)
            if measure is not None:
                error[place] += layer.error(mask).sum(0)
            if not bound[layer.index, sample.level].any():  # the first clip of each level
                found = map_error(layer.q[:1], layer.k[:1], mask.of_first(1), q_blocks=BOUND_BLOCKS)
                terms = torch.stack([found.error, found.probe, found.spread])
                bound[layer.index, sample.level] = terms.mean((1, 2)).cpu()

        self._visit(visit, measure, "calibrate masks")
        return Outcome(
            density=density / self._per_level.sum(),
            error=error / self._per_level,
            mass=mass / self._per_level,
            bound=bound.mean(1),
        )

    def sparse_error(self, k: Tensor, p: Tensor) -> Tensor:
        """Return the sparse model's relative velocity error by noise level, all heads at once."""
        errors = torch.zeros(len(self.noise_levels), dtype=torch.float64)
        dense = self._dense
        with self._sparse_with(k, p):
            for sample, v in zip(self.samples, dense, strict=True):
                change = self._velocity(sample) - v
                ratio = change.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
                errors[sample.level] += ratio.double().cpu().sum()
        return errors / self._per_level

    def sparse_density(self, k: Tensor, p: Tensor) -> Tensor:
        """Return the density of the sparse model's own masks, [L, H], meaned over the samples."""
        density = self._zeros()
        with self._sparse_with(k, p):
            for sample in self.samples:
                self._velocity(sample)
                for index, attention in enumerate(attentions(self.teacher).values()):
                    density[index] += attention.mask.density.sum(0).cpu()
        return density / self._per_level.sum()

    @contextmanager
    def _sparse_with(self, k: Tensor, p: Tensor) -> Iterator[None]:
        detach(self.teacher)
        attach(self.teacher, self.method)
        try:
            set_masks(self.teacher, k, p, self.choice, self.skip_below)
            yield
        finally:
            detach(self.teacher)
            attach(self.teacher, None)

    def _points(self, num_blocks: int) -> Tensor:
        """Return the numbers of blocks at which errors are measured, rising."""
        shares = torch.tensor(self.densities, dtype=torch.float64)
        points = (shares * num_blocks).round().clamp(1, num_blocks).long()
        if not self.method.policy.counts_blocks:  # their cost between two points is interpolated
            points = torch.cat([points, torch.tensor([1, num_blocks])])
        return points.unique()

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

    def _policy(self, layer: Layer, k: Tensor, p: Tensor | None = None) -> Hybrid:
        policy = layer.attention.policy
        policy.set_budget(k, torch.zeros_like(k) if p is None else p)
        return policy

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.layers), self.heads, *shape, dtype=torch.float64)


def _between(points: Tensor, costs: Tensor, num_blocks: int) -> Tensor:
    """Interpolate costs [L, H, D] at rising points [D], from 1 to num_blocks, to all of them."""
    at = torch.arange(1, num_blocks + 1)
    right = torch.searchsorted(points, at).clamp(1, len(points) - 1)
    left = points[right - 1]
    share = (at - left) / (points[right] - left)
    costs = costs.cummax(-1)[0]
    return costs[..., right - 1].lerp(costs[..., right], share.double())
