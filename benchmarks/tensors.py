"""q, k and v to judge estimators by: synthetic clusters, and those of a run's dense model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.sparse.attach import attentions
from gossamer.sparse.layout import TokenGrid

LEVELS = (0.9, 0.5, 0.1)  # noise levels of the captured tensors


@dataclass(frozen=True)
class Problem:
    """One self-attention: q, k, v [1, H, S, D], of a noise level or a seed."""

    group: str
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
        yield Problem(f"seed {seed}", q, k, v, grid)


@torch.no_grad()
def captured(
    device: torch.device, overrides: list[str], *, clips: int = 1, every: int = 1, layers: int = 2
) -> Iterator[Problem]:
    """Yield each `layers`-th layer of a run's dense model on held-out clips, at LEVELS.

    Of the heads, each `every`-th is taken. The run's data is encoded first if it is not there.
    """
    from gossamer.train.config import compose
    from gossamer.train.job import Job, make_accelerator
    from gossamer.train.model import velocity
    from gossamer.train.samples import evenly, noisy_samples
    from gossamer.train.stages import encode_stage

    cfg = compose([*overrides, f"device={device.type}"])
    job = Job(cfg, make_accelerator(cfg), [])
    encode_stage(job)
    dataset, teacher = job.dataset("heldout"), job.dense()
    items = [dataset[i] for i in evenly(len(dataset), clips)]
    seen: list[tuple[Any, ...]] = []
    for module in attentions(teacher).values():
        module.register_forward_hook(lambda module, args, out: seen.append(args))
    for sample in noisy_samples(items, list(LEVELS), 1, job.device):
        seen.clear()
        velocity(teacher, sample.x, sample.t, sample.text, sample.condition)
        for *tensors, grid, _ in seen[::layers]:
            q, k, v = (x[:, ::every].float().contiguous() for x in tensors)
            yield Problem(f"t={LEVELS[sample.level]}", q, k, v, grid)
