"""What one model does on the held-out clips."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gossamer.train.evaluate import MaskReport


@dataclass(frozen=True)
class Found:
    """What one model does on the held-out clips; the model itself is gone."""

    velocities: list[Tensor]
    latents: Tensor | None  # of the sampled clips; None without any
    seconds: dict[str, float]  # of a forward, and of all its attention layers
    backends: dict[str, Any] = field(default_factory=dict)  # errors to itself with other ones
    other_noise: Tensor | None = None  # its samples from another noise
    train_losses: list[list[float]] = field(default_factory=list)
    masks: MaskReport | None = None
    hit_rate: dict[str, Tensor] = field(default_factory=dict)
