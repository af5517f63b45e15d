"""Held-out clips: their noise, the videos sampled from it, and how like each other those are."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.train.codec import Codec
from gossamer.train.data.clips import evenly as spread
from gossamer.train.measures import Sample
from gossamer.train.noise import add_noise, mix
from gossamer.train.pipeline import euler_sample
from gossamer.train.quality import compare

EVALUATION_SEED = 7_777_777  # never a training seed: noise of calibration and evaluation
OTHER_NOISE = 1_000  # in place of a noise level: samples from another noise
JUDGED = ("after", "other_noise")  # the videos that slow measures are for, or the teacher's alone

Clip = dict[str, Any]  # an item of LatentDataset: latent, text, index, maybe condition


def noisy_samples(
    clips: list[Clip], noise_levels: list[float], batch_size: int, device: torch.device
) -> list[Sample]:
    """Return batches of each clip at each noise level; noise depends on clip and level alone.

    Clips stay in order; a batch is of one size.
    """
    samples = []
    for level, t in enumerate(noise_levels):
        for batch in _batches(clips, batch_size):
            latent = torch.stack([c["latent"] for c in batch])
            noise = torch.stack([_noise(c["latent"], c["index"], level) for c in batch])
            levels = torch.full((len(batch),), t)
            condition = _stack(batch, "condition")
            samples.append(
                Sample(
                    level=level,
                    x=add_noise(latent, noise, levels).to(device),
                    t=levels.to(device),
                    text=torch.stack([c["text"] for c in batch]).to(device),
                    condition=None if condition is None else condition.to(device),
                    target=(noise - latent).to(device),
                )
            )
    return samples


def sample_latents(
    model: nn.Module,
    clips: list[Clip],
    *,
    name: str,
    batch_size: int,
    steps: int,
    shift: float,
    device: torch.device,
    other_noise: bool = False,
) -> Tensor:
    """Return latents [B, C, f, h, w] sampled from each clip's own noise, or from another one."""
    level = OTHER_NOISE if other_noise else -1
    found = []
    for batch in _batches(clips, batch_size):
        condition = _stack(batch, "condition")
        latents = euler_sample(
            model,
            torch.stack([_noise(c["latent"], c["index"], level) for c in batch]).to(device),
            torch.stack([c["text"] for c in batch]).to(device),
            None if condition is None else condition.to(device),
            steps=steps,
            shift=shift,
            progress=f"sample {name}",
        )
        found.append(latents)
    return torch.cat(found)


def decode(latents: dict[str, Tensor], codec: Codec, device: torch.device) -> dict[str, Tensor]:
    """Return each name's videos, uint8 [B, F, H, W, 3]."""
    return {name: _to_uint8(codec.decode(x.to(device))) for name, x in latents.items()}


def judge(videos: dict[str, Tensor], extra: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Compare all videos with the real ones ("real/NAME") and the teacher's ("teacher/NAME").

    Returns each measure of train/quality.py by name, one number a clip; `extra` ones, which are
    slow, of the model's own samples alone.
    """
    judged = JUDGED if "after" in videos else (*JUDGED, "teacher")
    others = {name: v for name, v in videos.items() if name != "real"}
    pairs = {f"real/{name}": (v, videos["real"]) for name, v in others.items()}
    if "teacher" in others:
        teacher = others.pop("teacher")
        pairs |= {f"teacher/{name}": (v, teacher) for name, v in others.items()}
    return {
        name: compare(*pair, extra if name.split("/")[1] in judged else ())
        for name, pair in pairs.items()
    }


def keep_videos(videos: dict[str, Tensor], folder: Path, count: int | None) -> list[Path]:
    """Write clip-K.npz with uint8 [F, H, W, 3] under each name, for the first `count` clips."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(len(next(iter(videos.values())))):
        if count is None or i < count:
            files.append(folder / f"clip-{i}.npz")
            frames: dict[str, Any] = {name: v[i].cpu().numpy() for name, v in videos.items()}
            np.savez_compressed(files[-1], **frames)
    return files


def evenly(items: int, count: int) -> list[int]:
    """Return up to `count` indices spread over range(items)."""
    return spread(range(items), count)


def _noise(latent: Tensor, index: int, level: int) -> Tensor:
    seed = mix(EVALUATION_SEED, index, level + 1)
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def _batches(clips: list[Clip], size: int) -> Iterator[list[Clip]]:
    for _, same in groupby(clips, lambda clip: clip["latent"].shape):
        alike = list(same)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _stack(clips: list[Clip], key: str) -> Tensor | None:
    return torch.stack([c[key] for c in clips]) if key in clips[0] else None


def _to_uint8(video: Tensor) -> Tensor:
    """Return videos [B, 3, F, H, W] in [-1, 1] as uint8 [B, F, H, W, 3]."""
    scaled = (video.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 4, 1)
