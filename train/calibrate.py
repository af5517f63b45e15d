"""Calibration: run the dense teacher on a few samples and give each head its own budget.

The error of a head at a density is its effect on the model's velocity, to first order: with random
probes u on the velocity and g = d(u . v)/d(out) from one backward pass, E[(g . (out' - out))^2] is
the squared velocity error when only this head is sparse (Hutchinson), so one backward a probe
serves every layer, head and density. The budgets come from water-filling these curves.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.allocation import water_fill
from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import TokenGrid, permute_qkv
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid
from gossamer.train.calibration import Calibration
from gossamer.train.model import velocity

log = logging.getLogger(__name__)

TOP_K_SHARES = (1.0, 0.75, 0.5)  # of a head's budget given to Top-k; Top-p fills the rest
ROWS_KEPT = 64  # score rows a layer, head and sample kept to find p


@dataclass(frozen=True)
class Sample:
    """Noisy inputs of one noise level: x [B, C, f, h, w], t [B], text [B, L, dim]."""

    level: int
    x: Tensor
    t: Tensor
    text: Tensor
    condition: Tensor | None


@dataclass
class _Layer:
    """One layer's dense attention on one sample, in block order, and the probes' gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scores: BlockScores
    gradients: list[Tensor]

    def error(self, attention: SparseAttention, policy: Hybrid) -> tuple[Tensor, BlockMask]:
        """Return the squared velocity error [B, H] of the policy's mask, and the mask."""
        mask = policy(self.scores)
        out = attention.attend(self.q, self.k, self.v, mask)
        change = (out - self.out).float()
        effects = [(g * change).sum((2, 3)).square() for g in self.gradients]
        return torch.stack(effects).mean(0), mask


def calibrate(
    teacher: nn.Module,
    method: SparseMethod,
    samples: list[Sample],
    *,
    sparsity: float,
    noise_levels: list[float],
    densities: list[float],
    probes: int,
    seed: int,
    clips: int,
) -> Calibration:
    """Return per-head budgets of mean density 1 - sparsity for a teacher attached densely."""
    start = time.monotonic()
    layers = list(attentions(teacher))
    heads = int(teacher.config.num_attention_heads)  # type: ignore[arg-type]
    attention = SparseAttention(method, heads).requires_grad_(False).to(samples[0].x.device)
    curve = torch.zeros(len(layers), heads, len(densities), dtype=torch.float64)
    rows: list[list[Tensor]] = [[] for _ in layers]
    for _, index, layer in _capture(teacher, attention, samples, probes, seed, "calibrate curves"):
        for d, density in enumerate(densities):
            policy = Hybrid(k=density).to(layer.q.device)
            curve[index, :, d] += layer.error(attention, policy)[0].double().cpu().sum(0)
        rows[index].append(_some_rows(layer.scores.score))
    num_samples = sum(len(sample.t) for sample in samples)
    curve /= num_samples
    num_blocks = rows[0][0].shape[-1]
    target = 1 - sparsity
    if target * num_blocks < 1:
        raise ValueError(
            f"sparsity={sparsity}: allowed is at most {1 - 1 / num_blocks:.4f} with {num_blocks} "
            "blocks a row (one must stay); lower it or make the blocks smaller"
        )
    share = water_fill(
        torch.tensor(densities, dtype=torch.float64),
        curve.flatten(0, 1),
        target=target,
        num_blocks=num_blocks,
    ).view(len(layers), heads)
    budgets = [_budgets(share, rows, top_k) for top_k in TOP_K_SHARES]

    error = torch.zeros(len(TOP_K_SHARES), len(layers), heads, dtype=torch.float64)
    achieved = torch.zeros_like(error)
    mass = torch.zeros(*error.shape, len(noise_levels), dtype=torch.float64)
    for sample, index, layer in _capture(
        teacher, attention, samples, probes, seed, "calibrate split"
    ):
        true_mass = Oracle()(layer.q, layer.k, layer.v, *_layouts(layer.scores)).score
        for i, (k, p) in enumerate(budgets):
            policy = Hybrid(num_heads=heads).to(layer.q.device)
            policy.set_budget(k[index], p[index])
            effect, mask = layer.error(attention, policy)
            error[i, index] += effect.double().cpu().sum(0)
            achieved[i, index] += mask.density.cpu().sum(0)
            mass[i, index, :, sample.level] += mask.captured(true_mass).double().cpu().sum(0)
    best = error.argmin(0, keepdim=True)  # [1, L, H]
    per_level = num_samples / len(noise_levels)
    chosen_mass = mass.gather(0, best[..., None].expand(1, *mass.shape[1:]))[0] / per_level
    k, p = (torch.stack(values).gather(0, best)[0] for values in zip(*budgets, strict=True))
    return Calibration(
        layers=layers,
        num_heads=heads,
        noise_levels=noise_levels,
        target_density=target,
        planned_density=float(achieved.gather(0, best).mean()) / num_samples,
        k=k.tolist(),
        p=p.tolist(),
        captured_mass=chosen_mass.tolist(),
        curve_densities=densities,
        curve_error=curve.tolist(),
        clips=clips,
        seconds=time.monotonic() - start,
    )


def _capture(
    teacher: nn.Module,
    attention: SparseAttention,
    samples: list[Sample],
    probes: int,
    seed: int,
    title: str,
) -> Iterator[tuple[Sample, int, _Layer]]:
    """Yield each layer of the dense teacher on each sample, with gradients of random probes."""
    captured: list[tuple[Any, ...]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        captured.append((*args, out))

    handles = [a.register_forward_hook(keep) for a in attentions(teacher).values()]
    generator = torch.Generator(samples[0].x.device).manual_seed(seed)
    try:
        for sample in tqdm(samples, desc=title, unit="batch"):
            captured.clear()
            x = sample.x.detach().requires_grad_()  # the root that gives every layer a graph
            v = velocity(teacher, x, sample.t, sample.text, sample.condition)
            norm = v.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            outs = [c[-1] for c in captured]
            gradients = []
            for probe in range(probes):
                u = torch.empty_like(v).normal_(generator=generator) / norm
                keep_graph = probe + 1 < probes
                gradients.append(torch.autograd.grad((u * v).sum(), outs, retain_graph=keep_graph))
            for index, (query, key, value, grid, _, out) in enumerate(captured):
                per_probe = [g[index] for g in gradients]
                tensors = (query, key, value, out)
                yield sample, index, _in_blocks(attention, grid, tensors, per_probe)
    finally:
        for handle in handles:
            handle.remove()


def _in_blocks(
    attention: SparseAttention,
    grid: TokenGrid,
    tensors: tuple[Tensor, ...],
    gradients: list[Tensor],
) -> _Layer:
    q, k, v, out = (x.detach() for x in tensors)
    q_layout, kv_layout = attention.layout(q, k, v, grid)
    q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
    scores = attention.estimator(q, k, v, q_layout, kv_layout)
    per_probe = [q_layout.permute(g).float() for g in gradients]
    return _Layer(q, k, v, q_layout.permute(out), scores, per_probe)


def _layouts(scores: BlockScores) -> tuple[Any, Any]:
    return scores.q_layout, scores.kv_layout


def _some_rows(score: Tensor) -> Tensor:
    """Return evenly spaced rows of score [B, H, Nq, Nk] as [H, rows, Nk] on the CPU."""
    step = max(1, score.shape[2] // ROWS_KEPT)
    return score[:, :, ::step].transpose(0, 1).flatten(1, 2).cpu()


def _budgets(share: Tensor, rows: list[list[Tensor]], top_k: float) -> tuple[Tensor, Tensor]:
    """Split each head's share of blocks [L, H]: `top_k` of it as k, and p so that the mean fits."""
    k = share * top_k
    if top_k == 1:
        return k, torch.zeros_like(k)
    p = torch.stack([_fit_p(torch.cat(r, 1), s, f) for r, s, f in zip(rows, share, k, strict=True)])
    return k, p


def _fit_p(score: Tensor, share: Tensor, k: Tensor) -> Tensor:
    """Bisect p [H] so that rows [H, R, Nk] keep `share` [H] of their blocks on average."""
    ordered = score.sort(-1, descending=True)[0]
    mass_before = ordered.cumsum(-1) - ordered
    num_blocks = score.shape[-1]
    floor = (k * num_blocks).round().clamp(min=1)[:, None]
    low, high = torch.zeros_like(share), torch.ones_like(share)
    for _ in range(30):
        p = (low + high) / 2
        count = (mass_before < p[:, None, None]).sum(-1).maximum(floor)  # [H, R]
        too_many = count.double().mean(-1) > share * num_blocks
        low, high = torch.where(too_many, low, p), torch.where(too_many, p, high)
    return low
