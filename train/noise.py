"""The noise process x_t = (1 - t) x_0 + t noise, and how its noise level t is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseLevels(Protocol):
    """A distribution of noise levels t in (0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform draws u in (0, 1) to noise levels."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """t ~ U(0, 1)."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """t = s u / (1 + (s - 1) u): the grid of a sampler with flow shift s."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            allowed = "a finite number above 0"
            raise ValueError(f"shift={self.shift}: allowed is {allowed}; e.g. noise.shift=3")

    def __call__(self, u: Tensor) -> Tensor:
        return shift_levels(u, self.shift)


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """log sigma ~ N(mean, std^2), t = sigma / (1 + sigma) (TurboDiffusion)."""

    mean: float = 1.5
    std: float = 1.6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(
                f"mean={self.mean}, std={self.std}: allowed are finite numbers, std above 0; "
                "e.g. noise.mean=1.5 noise.std=1.6"
            )

    def __call__(self, u: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * u.double() - 1)
        return torch.sigmoid(self.mean + self.std * normal).to(u.dtype)


def shift_levels(u: Tensor, shift: float) -> Tensor:
    """Return s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def sample_noise(
    levels: NoiseLevels, latent: Tensor, seeds: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Draw t [B] and noise [B, C, f, h, w], each sample from its own seed.

    A sample's draw depends on its seed alone, not on the batch, the rank or the step before it.
    """
    noise, u = torch.empty_like(latent), torch.empty(len(seeds))
    for i, seed in enumerate(seeds):
        generator = torch.Generator(latent.device).manual_seed(mix(*seed))
        noise[i].normal_(generator=generator)
        u[i] = torch.rand((), generator=torch.Generator().manual_seed(mix(*seed, 1)))
    return levels(u.clamp(1e-4, 1 - 1e-4)).to(latent.device), noise


def add_noise(latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t of latents [B, C, f, h, w] at noise levels t [B]."""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * latent + t * noise


def mix(*numbers: int) -> int:
    """Return one 63-bit seed of several integers."""
    seed = 0x9E3779B97F4A7C15
    for number in numbers:
        seed = ((seed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed ^= seed >> 31
    return seed >> 1
