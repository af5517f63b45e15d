"""Which noise level, noise and prompt a sample of the training gets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.train.noise import NoiseLevels, add_noise, mix, sample_noise

DRAW_SEED = 5_555_555  # of the fixed draws: no training seed, so that all runs share them
PROMPT = 2  # ends the seed of a sample's prompt; 1 ends that of its noise level


@dataclass(frozen=True, eq=False)
class Noised:
    """Clips and their noise: what teacher and student see."""

    x: Tensor  # [B, C, f, h, w]
    t: Tensor  # [B]
    velocity: Tensor  # noise - latent, as x
    text: Tensor  # [B, L, dim]
    condition: Tensor | None  # as x
    index: list[int]  # of each clip in its split
    draw: list[int]  # which of its clip's fixed draws; 0 where draws are endless
    seeds: Sequence[tuple[int, ...]]  # of each sample: decides noise, level and prompt


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Draws each sample of a run from a seed of its own.

    With `count` 0 the seed is the run's and the sample's position in the run. Otherwise each clip
    has `count` draws, the same in every run, and takes them in turn, one in each epoch of `clips`
    clips; their noise is made on the CPU, because GPUs differ in theirs.
    `negative_share` of the samples get the text `negative` [L, dim] in place of their own.
    """

    levels: NoiseLevels
    seed: int = 0
    count: int = 0
    clips: int = 1
    negative: Tensor | None = None
    negative_share: float = 0.0

    def __call__(self, batch: dict[str, Tensor]) -> Noised:
        """Noise a batch with latent, text, maybe condition, index [B] and position [B]."""
        positions = batch["position"].tolist()
        if not self.count:
            seeds = [(self.seed, int(position)) for position in positions]
            return self._noised(batch, seeds, [0] * len(seeds))
        return self.fixed(batch, [position // self.clips % self.count for position in positions])

    def fixed(self, batch: dict[str, Tensor], draws: list[int]) -> Noised:
        """Noise each clip of a batch with its draw of the given number."""
        indices = batch["index"].tolist()
        seeds = [(DRAW_SEED, *pair) for pair in zip(indices, draws, strict=True)]
        return self._noised(batch, seeds, draws)

    def _noised(
        self, batch: dict[str, Tensor], seeds: Sequence[tuple[int, ...]], draws: list[int]
    ) -> Noised:
        latent, text = batch["latent"], batch["text"]
        like = torch.empty_like(latent, device="cpu") if self.count else latent
        t, noise = (drawn.to(latent.device) for drawn in sample_noise(self.levels, like, seeds))
        if self.negative is not None and self.negative_share:
            chosen = torch.tensor([_uniform(seed) < self.negative_share for seed in seeds])
            negative = self.negative.to(text)
            text = torch.where(chosen.to(text.device).view(-1, 1, 1), negative, text)
        return Noised(
            add_noise(latent, noise, t),
            t,
            noise - latent,
            text,
            batch.get("condition"),
            batch["index"].tolist() if "index" in batch else [],
            draws,
            seeds,
        )


def _uniform(seed: tuple[int, ...]) -> float:
    generator = torch.Generator().manual_seed(mix(*seed, PROMPT))
    return float(torch.rand((), generator=generator))
