"""Student against teacher on held-out clips: velocity error, masks, samples."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.train.codec import Codec
from gossamer.train.data.clips import evenly as spread
from gossamer.train.measures import Sample
from gossamer.train.model import velocity
from gossamer.train.noise import add_noise, mix
from gossamer.train.pipeline import euler_sample
from gossamer.train.quality import compare

log = logging.getLogger(__name__)

EVALUATION_SEED = 7_777_777  # never a training seed: noise of calibration and evaluation
OTHER_NOISE = 1_000  # in place of a noise level: samples from another noise
JUDGED = ("after", "other_noise")  # the videos that slow measures are for, or the teacher's alone
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
    """Return the model's velocities [B, C, f, h, w] on the CPU, one for each sample.

    The title is the progress bar's; with none there is no bar.
    """
    return [
        velocity(model, s.x, s.t, s.text, s.condition).cpu()
        for s in tqdm(samples, desc=title, unit="batch", disable=not title)
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
    """Mean density and captured attention mass of each layer and head, and one clip's masks.

    `selected` is bool [H, Nq, Nk] of the first clip at the middle noise level; empty where the
    layers' numbers of blocks differ. `velocities` are as those of `velocities`.
    """

    density: dict[str, Tensor] = field(default_factory=dict)
    recall: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    velocities: list[Tensor] = field(default_factory=list)

    @property
    def mean_density(self) -> float:
        return float(torch.stack(list(self.density.values())).mean())


@torch.no_grad()
def measure_masks(model: nn.Module, samples: list[Sample]) -> MaskReport:
    """Run the sparse model on all samples; measure its masks, counted in token pairs."""
    layers: dict[str, SparseAttention] = attentions(model)
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, attention in layers.items():

        def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            captured[name] = (args[0], args[1])

        handles.append(attention.register_forward_pre_hook(keep))
    density: dict[str, list[Tensor]] = {name: [] for name in layers}
    recall: dict[str, list[Tensor]] = {name: [] for name in layers}
    num_levels = 1 + max(s.level for s in samples)
    seen, selected, found = [0] * num_levels, {}, []
    try:
        for sample in tqdm(samples, desc="masks", unit="batch"):
            v = velocity(model, sample.x, sample.t, sample.text, sample.condition)
            found.append(v.cpu())
            few = max(0, min(len(sample.t), MASK_CLIPS - seen[sample.level]))
            is_shown = sample.level == num_levels // 2 and not seen[sample.level]
            seen[sample.level] += few
            for name, attention in layers.items():
                assert attention.mask is not None
                density[name].append(attention.mask.density.cpu())
                if is_shown:
                    selected[name] = attention.mask.selected[0].cpu()
                if few:
                    recall[name].append(_recall(attention, *captured[name], few))
    finally:
        for handle in handles:
            handle.remove()

    def mean(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat(rows).mean(0) for name, rows in parts.items()}

    return MaskReport(mean(density), mean(recall), selected, found)


def flow_losses(found: list[Tensor], samples: list[Sample], num_levels: int) -> list[list[float]]:
    """Return the mean squared error to noise - latent as [clip][noise level]."""
    by_level: list[list[float]] = [[] for _ in range(num_levels)]
    for v, sample in zip(found, samples, strict=True):
        assert sample.target is not None
        by_level[sample.level] += (v - sample.target.cpu()).square().flatten(1).mean(1).tolist()
    return [list(row) for row in zip(*by_level, strict=True)]


@torch.no_grad()
def forward_seconds(model: nn.Module, sample: Sample) -> float:
    """Return the median time of a forward of the sample's batch, mask building included."""

    def once() -> float:
        start = time.perf_counter()
        velocity(model, sample.x, sample.t, sample.text, sample.condition).sum().item()  # waits
        return time.perf_counter() - start

    warm_up, runs = (3, 10) if sample.x.is_cuda else (0, 1)
    return float(np.median([once() for _ in range(warm_up + runs)][warm_up:]))


@torch.no_grad()
def attention_seconds(model: nn.Module, sample: Sample) -> float:
    """Return the median time that all attention layers take of a forward of the sample's batch.

    From the projected q, k, v to the output: order, mask, kernels; on a GPU the host's time as well
    where it is the slower one.
    """
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if sample.x.is_cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    def once() -> float:
        marks.clear()
        velocity(model, sample.x, sample.t, sample.text, sample.condition).sum().item()  # waits
        pairs = zip(marks[::2], marks[1::2], strict=True)  # a layer's start and end
        return sum(a.elapsed_time(b) / 1e3 if sample.x.is_cuda else b - a for a, b in pairs)

    handles = []
    for layer in attentions(model).values():
        handles.append(layer.register_forward_pre_hook(mark))
        handles.append(layer.register_forward_hook(mark))
    try:
        warm_up, runs = (2, 5) if sample.x.is_cuda else (0, 1)
        return float(np.median([once() for _ in range(warm_up + runs)][warm_up:]))
    finally:
        for handle in handles:
            handle.remove()


def other_backends(model: nn.Module, samples: list[Sample]) -> dict[str, list[Tensor]]:
    """Return the dense model's velocities with each of torch's attention backends that can run."""
    found = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        name = backend.name.removesuffix("_ATTENTION").lower()
        try:
            with sdpa_kernel(backend):
                found[name] = velocities(model, samples, f"teacher, {name}")
        except RuntimeError as error:
            if "kernel" not in str(error).lower():
                raise
            log.info("attention backend %s cannot run here", name)
    return found


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


def _to_uint8(video: Tensor) -> Tensor:
    """Return videos [B, 3, F, H, W] in [-1, 1] as uint8 [B, F, H, W, 3]."""
    scaled = (video.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 4, 1)
