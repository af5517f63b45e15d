"""What calibration measures on a dense teacher: error curves, densities, and what budgets do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.allocation import Measure, coverage
from gossamer.sparse.attach import (
    attach,
    attending_densely,
    attentions,
    detach,
    family_of,
    transformer_of,
)
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.bound import map_error
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.policies import Hybrid
from gossamer.train.calibration import set_masks
from gossamer.train.measured import Measured, Outcome, between
from gossamer.train.measures import Layer, Sample, Seen, visit_layers
from gossamer.train.model import velocity
from gossamer.train.processes import shared_out

Choice = list[list[int]]  # each layer's and head's place in a layout's orders; empty without
Figures = tuple[Tensor, ...]
Given = TypeVar("Given")
Result = TypeVar("Result")

BOUND_BLOCKS = 4  # q blocks of a head that Proposition 1 is evaluated on


class Gauge:
    """Measures a teacher that is attached densely, and leaves it so.

    `densities` are shares of blocks at which errors are measured. Curves once measured are kept.
    All processes of an accelerator call it and share the samples; each has the same figures, which
    do not depend on how many they are.
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
        accelerator: Accelerator | None = None,
    ) -> None:
        self.teacher, self.method, self.samples = teacher, method, samples
        self.noise_levels, self.densities = noise_levels, densities
        self.probes, self.seed, self.accelerator = probes, seed, accelerator
        self.layers = list(attentions(teacher))
        self.heads = int(teacher.config.num_attention_heads)  # type: ignore[arg-type]
        counts = [sum(len(s.t) for s in samples if s.level == i) for i in range(len(noise_levels))]
        self._per_level = torch.tensor(counts, dtype=torch.float64)
        self._found: dict[Any, Measured] = {}
        self._by_order: dict[Measure, list[Measured]] = {}
        self._dense: dict[int, Tensor] = {}  # velocities of this process's samples
        self.choice: Choice = []
        self.skip_below: Tensor | None = None  # [L, H], of a filter that was tuned
        if isinstance(method.layout, PerHead):  # clusters are what its orders are compared with
            method = replace(method, layout=method.layout.with_clusters())
        width = int(teacher.config.attention_head_dim)  # type: ignore[arg-type]
        sparse = SparseAttention(method, self.heads, width)  # of one layer after the other
        self._sparse = sparse.requires_grad_(False).to(samples[0].x.device)

    def untune(self) -> None:
        """Return to the filter as the method has it."""
        self.skip_below = None
        if isinstance(self.method.compensation, FilteredDrop):
            self._sparse.compensation.set_limit(self.method.compensation.skip_below)

    @property
    def clips(self) -> int:
        return int(self._per_level[0])

    @property
    def grid(self) -> TokenGrid:
        model = transformer_of(self.teacher)
        return family_of(model).token_grid(model, {"hidden_states": self.samples[0].x})

    def worst_error(self, k: Tensor, p: Tensor) -> Tensor:
        """Return each head's relative L1 error under k and p [L, H] on its worst clip, [L, H]."""

        def of_layer(sample: Sample, layer: Layer) -> Figures:
            mask = layer.mask(self._policy(k[layer.index], p[layer.index]))
            return (layer.error(mask).amax(0),)

        ((error,),) = self._measured(of_layer, "relative_l1", "calibrate bound")
        return reduce(torch.maximum, error)

    def curves(self, measure: Measure | None) -> Measured:
        """Measure every head's error at each of the densities, and what each budget costs."""
        key = measure, str(self.choice)
        if key not in self._found:
            (self._found[key],) = self._curves(measure, [self.choice])
        return self._found[key]

    def curves_by_order(self, measure: Measure, orders: int) -> list[Measured]:
        """Return the curves with all heads in each of the layout's orders, from one visit."""
        if measure not in self._by_order:
            alike = [[[order] * self.heads] * len(self.layers) for order in range(orders)]
            self._by_order[measure] = self._curves(measure, alike)
        return self._by_order[measure]

    def _curves(self, measure: Measure | None, choices: list[Choice]) -> list[Measured]:
        by_blocks = self.method.policy.counts_blocks

        def of_layer(sample: Sample, layer: Layer) -> Figures:
            num_blocks = layer.scores.kv_layout.num_blocks
            density, costs, errors = torch.zeros(num_blocks), [], []
            if by_blocks:
                covered = coverage(layer.scores)[1]
                sizes = layer.scores.q_layout.sizes.double()
                weight = (sizes / sizes.sum(-1, keepdim=True)).expand(covered.shape[:3])
                density = torch.einsum("bhqk,bhq->hk", covered, weight)
            points = self._points(num_blocks)
            if by_blocks and not measure:  # then no mask is needed
                nothing = torch.zeros(self.heads, len(points))
                return density, nothing, nothing
            for point in points.tolist():
                mask = layer.mask(self._policy(torch.full((self.heads,), point / num_blocks)))
                costs.append(mask.density.sum(0))
                errors.append(layer.error(mask).sum(0) if measure else torch.zeros(self.heads))
            return density, torch.stack(costs, -1), torch.stack(errors, -1)

        found, title = [], f"calibrate {measure or 'density'}"
        for figures in self._measured(of_layer, measure, title, choices):
            density, costs = (_sum(parts) for parts in figures[:2])
            points = self._points(density.shape[-1])
            density = density if by_blocks else between(points, costs, density.shape[-1])
            error = self._by_level(figures[2], dim=2)
            found.append(Measured(points, error, density / self._per_level.sum()))
        return found

    def density(self, k: Tensor, p: Tensor | None = None) -> Tensor:
        """Return the density of each head's masks of k and p [L, H], meaned over the samples."""

        def of_layer(sample: Sample, layer: Layer) -> Figures:
            of_layer = None if p is None else p[layer.index]
            return (layer.mask(self._policy(k[layer.index], of_layer)).density.sum(0),)

        ((density,),) = self._measured(of_layer, None, "calibrate density")
        return _sum(density) / self._per_level.sum()

    def outcome(self, k: Tensor, p: Tensor, measure: Measure | None) -> Outcome:
        """Measure the masks of k and p [L, H]."""
        levels = [sample.level for sample in self.samples]
        first = [levels.index(level) for level in range(len(self.noise_levels))]
        nothing = torch.zeros(self.heads), torch.zeros(3)

        def of_layer(sample: Sample, layer: Layer) -> Figures:
            mask = layer.mask(self._policy(k[layer.index], p[layer.index]))
            error, bound = nothing
            if measure is not None:
                error = layer.error(mask).sum(0)
            if any(sample is self.samples[i] for i in first):
                found = map_error(layer.q[:1], layer.k[:1], mask.of_first(1), q_blocks=BOUND_BLOCKS)
                bound = torch.stack([found.error, found.probe, found.spread]).mean((1, 2))
            mass = mask.captured(layer.mass).double().cpu().sum(0)
            return mask.density.sum(0), error, mass, bound

        (figures,) = self._measured(of_layer, measure, "calibrate masks")
        density, error, mass, bound = figures
        return Outcome(
            density=_sum(density) / self._per_level.sum(),
            error=self._by_level(error, dim=2),
            mass=self._by_level(mass, dim=2),
            bound=torch.stack([bound[i] for i in first], 1).mean(1),
        )

    def sparse_error(self, k: Tensor, p: Tensor) -> Tensor:
        """Return the sparse model's relative velocity error by noise level, all heads at once."""

        def of_sample(numbered: tuple[int, Sample]) -> Tensor:
            index, sample = numbered
            if index not in self._dense:
                with attending_densely(self.teacher):
                    self._dense[index] = self._velocity(sample)
            v = self._dense[index]
            change = self._velocity(sample) - v
            return (change.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)).double().cpu().sum()

        with self._sparse_with(k, p):
            return self._by_level(self._share(of_sample, enumerate(self.samples)), dim=0)

    def sparse_density(self, k: Tensor, p: Tensor) -> Tensor:
        """Return the density of the sparse model's own masks, [L, H], meaned over the samples."""

        def of_sample(sample: Sample) -> Tensor:
            self._velocity(sample)
            layers = attentions(self.teacher).values()
            return torch.stack([attention.mask.density.sum(0).cpu() for attention in layers])

        with self._sparse_with(k, p):
            return _sum(self._share(of_sample, self.samples)) / self._per_level.sum()

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

    @torch.no_grad()
    def _velocity(self, sample: Sample) -> Tensor:
        return velocity(self.teacher, sample.x, sample.t, sample.text, sample.condition)

    def _measured(
        self,
        of_layer: Callable[[Sample, Layer], Figures],
        measure: Measure | None,
        title: str,
        choices: Sequence[Choice] | None = None,
    ) -> list[list[list[Tensor]]]:
        """Return what `of_layer` gives with the orders of each choice, the present one if left out.

        Of each of its figures it is a list: of every sample [L, ...], on the CPU.
        """
        choices = [self.choice] if choices is None else choices

        def of_sample(given: tuple[Sample, list[Tensor]]) -> list[Figures]:
            sample, probes = given
            rows: list[list[Figures]] = [[] for _ in self.layers]

            def visit(seen: Seen) -> None:
                if self.skip_below is not None:
                    self._sparse.compensation.set_limit(self.skip_below[seen.index])
                for choice in choices:
                    if choice:
                        self._sparse.layout.set_choice(torch.tensor(choice[seen.index]))
                    found = of_layer(sample, seen.under(self._sparse))
                    rows[seen.index].append(tuple(x.cpu() for x in found))

            visit_layers(self.teacher, sample, visit, measure=measure, probes=probes)
            return [
                tuple(torch.stack(column) for column in zip(*layers, strict=True))
                for layers in zip(*rows, strict=True)
            ]

        drawn = zip(self.samples, self._probes(measure), strict=True)
        found = self._share(of_sample, drawn, title)
        return [
            [list(parts) for parts in zip(*figures, strict=True)]
            for figures in zip(*found, strict=True)
        ]

    def _probes(self, measure: Measure | None) -> Iterator[list[Tensor]]:
        """Yield each sample's probes, which do not depend on who takes the samples before it."""
        generator = torch.Generator(self.samples[0].x.device).manual_seed(self.seed)
        count = self.probes if measure == "velocity" else 0
        for sample in self.samples:
            yield [torch.empty_like(sample.x).normal_(generator=generator) for _ in range(count)]

    def _share(
        self, work: Callable[[Given], Result], given: Iterable[Given], title: str = ""
    ) -> list[Result]:
        """Return work(item) of what is given for each sample; the processes share the samples."""
        is_shown = title and (self.accelerator is None or self.accelerator.is_main_process)
        total = len(self.samples)
        bar = tqdm(given, desc=title, unit="batch", total=total, disable=not is_shown)
        return shared_out(work, bar, self.accelerator)

    def _by_level(self, of_samples: list[Tensor], dim: int) -> Tensor:
        """Return the mean by noise level, a new dimension, of sums over the clips of a sample."""
        rows = [
            _sum([x for x, s in zip(of_samples, self.samples, strict=True) if s.level == level])
            / self._per_level[level]
            for level in range(len(self.noise_levels))
        ]
        return torch.stack(rows, dim)

    def _policy(self, k: Tensor, p: Tensor | None = None) -> Hybrid:
        policy: Hybrid = self._sparse.policy
        policy.set_budget(k, torch.zeros_like(k) if p is None else p)
        return policy


def _sum(parts: list[Tensor]) -> Tensor:
    """Return the sum, from the first to the last."""
    return reduce(torch.add, parts).double()
