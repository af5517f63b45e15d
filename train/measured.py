"""What a gauge finds: error curves of every head, and what budgets do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.sparse.allocation import Curves


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


def between(points: Tensor, costs: Tensor, num_blocks: int) -> Tensor:
    """Interpolate costs [L, H, D] at rising points [D], from 1 to num_blocks, to all of them."""
    at = torch.arange(1, num_blocks + 1)
    right = torch.searchsorted(points, at).clamp(1, len(points) - 1)
    left = points[right - 1]
    share = (at - left) / (points[right] - left)
    costs = costs.cummax(-1)[0]
    return costs[..., right - 1].lerp(costs[..., right], share.double())
