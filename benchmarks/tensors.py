"""q, k and v to judge estimators by: synthetic clusters, and those of the demo's teacher."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.sparse.attach import attach, attentions
from gossamer.sparse.layout import TokenGrid

LEVELS = (0.9, 0.5, 0.1)  # noise levels of the captured tensors


@dataclass(frozen=True)
class Problem:
    """One self-attention: q, k, v [1, H, S, D]."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    grid: TokenGrid


def synthetic(device: torch.device, *, seeds: int = 3, every: int = 1) -> Iterator[Problem]:
    """Yield tokens around 24 centers of q and 48 of k in each head, at random places.

    Of the heads, each `every`-th is taken.
    """
    grid, heads, dim = TokenGrid(8, 8, 16), 4, 32
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def around(centers: int, spread: float, generator: torch.Generator = generator) -> Tensor:
            center = torch.randn(1, heads, centers, dim, generator=generator) * 1.5
            place = torch.randint(0, centers, (1, heads, grid.num_tokens), generator=generator)
            points = center.gather(2, place[..., None].expand(-1, -1, -1, dim))
            return points + spread * torch.randn(points.shape, generator=generator)

        q, k = around(24, 0.5), around(48, 0.5)
        v = k @ torch.randn(1, heads, dim, dim, generator=generator) * dim**-0.5
        v = v + 0.5 * torch.randn(v.shape, generator=generator)
        q, k, v = (x[:, ::every].to(device) for x in (q, k, v))
        yield Problem(f"synthetic, seed {seed}", q, k, v, grid)


@torch.no_grad()
def captured(
    device: torch.device, folder: Path, *, clips: int = 1, every: int = 1
) -> Iterator[Problem]:
    """Yield every other layer of the demo's teacher on held-out clips, dense, at LEVELS.

    Of the heads, each `every`-th is taken.

    `folder` keeps the demo's encoded clips; they are encoded (a few seconds) if not there.
    """
    from gossamer.train.config import build, compose, encode_settings
    from gossamer.train.data.dataset import LatentDataset
    from gossamer.train.data.encode import encode
    from gossamer.train.evaluate import evenly, noisy_samples
    from gossamer.train.model import velocity

    cfg = compose(["recipe=demo"])
    codec, text = build(cfg.codec), build(cfg.text)
    encode(cfg.data.source, folder, codec=codec, text=text, **encode_settings(cfg))
    dataset = LatentDataset(folder, "heldout")
    items = [dataset[i] for i in evenly(len(dataset), clips)]
    teacher = attach(build(cfg.model).load(0), None).eval().to(device)
    seen: list[tuple[Any, ...]] = []
    for module in attentions(teacher).values():
        module.register_forward_hook(lambda module, args, out: seen.append(args))
    for sample in noisy_samples(items, list(LEVELS), len(items), device):
        seen.clear()
        velocity(teacher, sample.x, sample.t, sample.text, sample.condition)
        for layer in range(0, len(seen), 2):
            q, k, v, grid, _ = seen[layer]
            for clip in range(len(items)):
                part = (slice(clip, clip + 1), slice(None, None, every))
                name = f"t={LEVELS[sample.level]}, layer {layer}"
                q_, k_, v_ = (x[part].float().contiguous() for x in (q, k, v))
                yield Problem(name, q_, k_, v_, grid)
