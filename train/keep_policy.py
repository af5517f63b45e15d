"""Calibration without a choice: the policy's own k and p for every head, and what they capture."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import permute_qkv
from gossamer.sparse.mask import keep_text
from gossamer.train.calibrate import Sample
from gossamer.train.calibration import Calibration
from gossamer.train.model import velocity


@torch.no_grad()
def keep_policy(
    teacher: nn.Module,
    method: SparseMethod,
    samples: list[Sample],
    *,
    sparsity: float,
    noise_levels: list[float],
    clips: int,
) -> Calibration:
    """Return the method's k and p for all heads, measured on a teacher attached densely.

    No gradients, so that it fits where `calibrate` does not; the error curves stay empty.
    """
    start = time.monotonic()
    layers = attentions(teacher)
    heads = int(teacher.config.num_attention_heads)  # type: ignore[arg-type]
    sparse = SparseAttention(method, heads).to(next(teacher.parameters()).device)
    density = torch.zeros(len(layers), heads, dtype=torch.float64)
    mass = torch.zeros(len(layers), heads, len(noise_levels), dtype=torch.float64)
    sample = samples[0]

    def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
        q, k, v, grid, _ = args
        q_layout, kv_layout = sparse.layout(q, k, v, grid)
        q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
        mask = keep_text(sparse.policy(sparse.estimator(q, k, v, q_layout, kv_layout)))
        captured: Tensor = mask.captured(Oracle()(q, k, v, q_layout, kv_layout).score)
        index = places[module]
        density[index] += mask.density.sum(0).cpu()
        mass[index, :, sample.level] += captured.double().sum(0).cpu()

    places = {module: index for index, module in enumerate(layers.values())}
    handles = [module.register_forward_pre_hook(measure) for module in places]
    try:
        for sample in tqdm(samples, desc="measure policy", unit="batch"):
            velocity(teacher, sample.x, sample.t, sample.text, sample.condition)
    finally:
        for handle in handles:
            handle.remove()
    num_samples = sum(len(s.t) for s in samples)
    return Calibration(
        layers=list(layers),
        num_heads=heads,
        noise_levels=noise_levels,
        target_density=1 - sparsity,
        planned_density=float(density.mean()) / num_samples,
        k=sparse.policy.k.expand(len(layers), heads).tolist(),
        p=sparse.policy.p.expand(len(layers), heads).tolist(),
        captured_mass=(mass / (num_samples / len(noise_levels))).tolist(),
        curve_densities=[],
        curve_error=[],
        clips=clips,
        seconds=time.monotonic() - start,
    )
