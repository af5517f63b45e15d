"""Student against teacher on held-out clips: velocity error, masks, samples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.train.codec import Codec
from gossamer.train.measures import Sample
from gossamer.train.model import velocity
from gossamer.train.noise import add_noise, mix
from gossamer.train.pipeline import euler_sample

EVALUATION_SEED = 7_777_777  # never a training seed: noise of calibration and evaluation
MASK_CLIPS = 2  # clips whose true attention mass is computed

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


@torch.no_grad()
def velocities(model: nn.Module, samples: list[Sample], title: str) -> list[Tensor]:
    """Return the model's velocities [B, C, f, h, w] on the CPU, one for each sample."""
    return [
        velocity(model, s.x, s.t, s.text, s.condition).cpu()
        for s in tqdm(samples, desc=title, unit="batch")
    ]


def relative_errors(
    student: list[Tensor], teacher: list[Tensor], samples: list[Sample], num_levels: int
) -> list[list[float]]:
    """Return ||student - teacher|| / ||teacher|| as [clip][noise level]."""
    by_level: list[list[float]] = [[] for _ in range(num_levels)]
    for mine, theirs, sample in zip(student, teacher, samples, strict=True):
        error = (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        by_level[sample.level] += error.tolist()
    return [list(row) for row in zip(*by_level, strict=True)]


@dataclass
class MaskReport:
    """Mean density and captured attention mass of each layer and head."""

    density: dict[str, Tensor] = field(default_factory=dict)
    recall: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean_density(self) -> float:
        return float(torch.stack(list(self.density.values())).mean())


@torch.no_grad()
def measure_masks(model: nn.Module, samples: list[Sample]) -> MaskReport:
    """Run the sparse model on all samples and measure its masks, counted in token pairs."""
    layers: dict[str, SparseAttention] = attentions(model)
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, attention in layers.items():

        def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            captured[name] = (args[0], args[1])

        handles.append(attention.register_forward_pre_hook(keep))
    density: dict[str, list[Tensor]] = {name: [] for name in layers}
    recall: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen = [0] * (1 + max(s.level for s in samples))
    try:
        for sample in tqdm(samples, desc="masks", unit="batch"):
            velocity(model, sample.x, sample.t, sample.text, sample.condition)
            few = max(0, min(len(sample.t), MASK_CLIPS - seen[sample.level]))
            seen[sample.level] += few
            for name, attention in layers.items():
                assert attention.mask is not None
                density[name].append(attention.mask.density.cpu())
                if few:
                    recall[name].append(_recall(attention, *captured[name], few))
    finally:
        for handle in handles:
            handle.remove()

    def mean(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat(rows).mean(0) for name, rows in parts.items()}

    return MaskReport(mean(density), mean(recall))


def sample_videos(
    models: dict[str, nn.Module],
    clips: list[Clip],
    codec: Codec,
    folder: Path,
    *,
    steps: int,
    shift: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Sample each clip with each model from the same noise; save frames, return PSNR lists.

    Writes clip-K.npz with uint8 [F, H, W, 3] under each model's name and `real`. The lists are
    the PSNR in dB of each model to the real clip ("real/<name>") and, where a model is named
    teacher, to its sample ("teacher/<name>"), and of holding the frames that the models are given
    ("real/repeat").
    """
    others = [name for name in models if name != "teacher" and "teacher" in models]
    if not clips:
        names = [*(f"real/{name}" for name in models), *(f"teacher/{name}" for name in others)]
        return {name: [] for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    text = torch.stack([c["text"] for c in clips]).to(device)
    condition = _stack(clips, "condition")
    condition = None if condition is None else condition.to(device)
    noise = torch.stack([_noise(c["latent"], c["index"], -1) for c in clips]).to(device)
    latents = {"real": torch.stack([c["latent"] for c in clips]).to(device)}
    if condition is not None:
        latents["repeat"] = condition
    for name, model in models.items():
        latents[name] = euler_sample(
            model, noise, text, condition, steps=steps, shift=shift, progress=f"sample {name}"
        )
    videos = {name: _to_uint8(codec.decode(x)) for name, x in latents.items()}
    for i in range(len(clips)):
        np.savez_compressed(folder / f"clip-{i}.npz", **{n: v[i] for n, v in videos.items()})
    psnr = {f"real/{n}": _psnr(v, videos["real"]) for n, v in videos.items() if n != "real"}
    return psnr | {f"teacher/{n}": _psnr(videos[n], videos["teacher"]) for n in others}


def evenly(items: int, count: int) -> list[int]:
    """Return up to `count` indices spread over range(items)."""
    count = min(items, count)
    return [int((i + 0.5) * items / count) for i in range(count)]


def _recall(attention: SparseAttention, q: Tensor, k: Tensor, clips: int) -> Tensor:
    mask = attention.mask
    assert mask is not None
    q_layout, kv_layout = mask.q_layout.of_first(clips), mask.kv_layout.of_first(clips)
    q, k = q_layout.permute(q[:clips]), kv_layout.permute(k[:clips])
    mass = Oracle()(q, k, k, q_layout, kv_layout).score
    return type(mask)(q_layout, kv_layout, mask.selected[:clips]).captured(mass).cpu()


def _noise(latent: Tensor, index: int, level: int) -> Tensor:
    seed = mix(EVALUATION_SEED, index, level + 1)
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def _batches(clips: list[Clip], size: int) -> Iterator[list[Clip]]:
    for _, same in groupby(clips, lambda clip: clip["latent"].shape):
        alike = list(same)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _stack(clips: list[Clip], key: str) -> Tensor | None:
    return torch.stack([c[key] for c in clips]) if key in clips[0] else None


def _to_uint8(video: Tensor) -> np.ndarray:
    """Return videos [B, 3, F, H, W] in [-1, 1] as uint8 [B, F, H, W, 3]."""
    scaled = (video.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def _psnr(a: np.ndarray, b: np.ndarray) -> list[float]:
    error = ((a.astype(np.float64) - b) ** 2).reshape(len(a), -1).mean(1)
    return (10 * np.log10(255**2 / np.maximum(error, 1e-9))).tolist()
