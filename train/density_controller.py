"""Holds the mean density of a student with trained budgets while they move between its heads.

Alone, every budget would grow: more blocks always lower the loss. The controller keeps the mean
density d at its target by projection, which unlike a price on density that is adapted over many
steps (dual ascent) has no rate to tune, is right from the first step and cannot oscillate:

- before an optimizer step it adds price * c to the budgets' gradient g, c being the gradient of d.
  The price is the median of -g / c, by which one more share of density lowers the loss in a head,
  with c as its weight: as much density belongs to heads that gain less, which shrink, as to heads
  that gain more, which grow. AdamW moves all by about the same, so that is what keeps d. (With
  the mean, -(g . c) / (c . c), the few largest gains made all other heads of the demo shrink.)
- after it, the log-odds of all budgets move by one number, so that d is back at its target by a
  linear estimate. Measured densities, noisy with Top-p, correct the estimate slowly.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.policies import TrainedHybrid
from gossamer.sparse.sequence import SequenceParallel

_TRUST = 0.2  # share of each measurement in the estimate of the density
_MAX_SHIFT = 0.05  # of the log-odds in one step


class DensityController:
    """Projects the gradients and budgets of a student's TrainedHybrid policies; else does nothing.

    `target` is the mean density over layers and heads. `accelerator` shares what was measured, so
    that the budgets stay the same in every process. With `sequence` each has its own heads' masks.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        accelerator: Any,
        sequence: SequenceParallel | None = None,
    ) -> None:
        self._layers = [
            attention
            for attention in attentions(model).values()
            if isinstance(attention, SparseAttention)
            and isinstance(attention.policy, TrainedHybrid)
        ]
        self._target, self._accelerator, self._sequence = target, accelerator, sequence
        self._estimate = target  # of the density at the present budgets
        self._slope = self._before = torch.empty(0)  # of the density in all shifts; the shifts

    @property
    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds."""
        return {"estimate": self._estimate}

    def load_state(self, state: dict[str, float]) -> None:
        self._estimate = state["estimate"]

    @torch.no_grad()
    def before_step(self) -> dict[str, float]:
        """Project the gradients of the shifts; return density and price for the metrics."""
        if not self._layers:
            return {}
        slopes, densities = [], []
        for attention in self._layers:
            assert attention.mask is not None and attention.band is not None
            slopes.append(self._density_slope(attention).flatten())
            densities.append(attention.mask.density.mean())
        slope = torch.cat(slopes) / slopes[0].numel() * 2 / len(slopes)
        density = torch.stack(densities).mean().to(slope.dtype)
        shared = self._accelerator.reduce(torch.cat([slope, density[None]]), "mean")
        self._slope, measured = shared[:-1], float(shared[-1])
        self._estimate += _TRUST * (measured - self._estimate)
        gradient = torch.cat([_flat(shift.grad) for shift in self._shifts()])
        price = _median(-gradient, self._slope)
        parts = (price * self._slope).split([shift.numel() for shift in self._shifts()])
        for shift, part in zip(self._shifts(), parts, strict=True):
            assert shift.grad is not None
            shift.grad.add_(part)
        self._before = torch.cat([_flat(shift) for shift in self._shifts()])
        return {"density": measured, "density_price": float(price)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the log-odds of all budgets by one number, back to the target."""
        if not self._layers:
            return
        moved = torch.cat([_flat(shift) for shift in self._shifts()]) - self._before
        total = float(self._slope.sum())
        predicted = self._estimate + float(self._slope @ moved)
        needed = (self._target - predicted) / total if total > 0 else 0.0
        needed = max(-_MAX_SHIFT, min(_MAX_SHIFT, needed))
        for shift in self._shifts():
            shift.add_(needed)
        self._estimate = predicted + total * needed

    def _density_slope(self, attention: SparseAttention) -> Tensor:
        policy = attention.policy
        measure = partial(policy.density_slope, attention.band, attention.mask)
        if self._sequence is None:
            return measure()
        return self._sequence.at_own_heads(policy, policy.k_shift.numel(), measure)

    def _shifts(self) -> list[nn.Parameter]:
        return [p for a in self._layers for p in (a.policy.k_shift, a.policy.p_shift)]


def _median(gain: Tensor, slope: Tensor) -> Tensor:
    """Return the median of gain / slope with slope as its weight; 0 where all slopes are 0."""
    ratio, order = torch.where(slope > 0, gain / slope, 0).sort(stable=True)
    weight = slope[order].cumsum(0)
    return ratio[(weight < weight[-1] / 2).sum().clamp(max=len(ratio) - 1)]


def _flat(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.detach().clone().flatten()
