"""Student against teacher on held-out clips: velocities and their errors, masks, times."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.train.measures import Sample
from gossamer.train.model import velocity

log = logging.getLogger(__name__)

MASK_CLIPS = 2  # clips whose true attention mass is computed


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


def _recall(attention: SparseAttention, q: Tensor, k: Tensor, clips: int) -> Tensor:
    mask = attention.mask
    assert mask is not None
    q_layout, kv_layout = mask.q_layout.of_first(clips), mask.kv_layout.of_first(clips)
    q, k = q_layout.permute(q[:clips]), kv_layout.permute(k[:clips])
    mass = Oracle()(q, k, k, q_layout, kv_layout).score
    return type(mask)(q_layout, kv_layout, mask.selected[:clips]).captured(mass).cpu()
