"""What a step takes on one GPU, counted on tensors without data before any weight is read.

The run's own code takes a training step, or measures a sample of the calibration, on the meta
device: the student with its attention, the teacher, the loss, gradient checkpointing. So the count
follows the code. What it does not see: the CUDA context, memory that a kernel needs inside itself,
fragmentation, torch.compile's savings.
"""

import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gossamer.sparse.allocation import coverage
from gossamer.sparse.attach import attach, mask_parameters, method_from_spec
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.train.config import build
from gossamer.train.distiller import Distiller
from gossamer.train.draws import Noised
from gossamer.train.live_bytes import GRADIENTS, OTHER, LikeCuda, LiveBytes
from gossamer.train.lora import insert_adapters
from gossamer.train.measures import REPLAYED, Sample, Seen, visit_layers
from gossamer.train.model import blocks_of
from gossamer.train.refusal import Refusal
from gossamer.train.teacher import Cached, Frozen, Offloaded, Shared

META = torch.device("meta")
GIB = 2**30
_WORKSPACE = 64 << 20  # cuBLAS: 32 MiB each for forward and backward, on an H100


@dataclass(frozen=True, kw_only=True)
class Split:
    """How processes share a step. Each number divides: replicas the batch alone, others memory.

    shards: weights, gradients, optimizer and average (FSDP2); sequence: the tokens (Ulysses).
    """

    replicas: int = 1
    shards: int = 1
    sequence: int = 1
    teacher_sharded: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by what they hold; `phase` is when that is."""

    phase: str
    parts: dict[str, int]
    states: dict[str, int] = field(default_factory=dict)  # held whole, whenever: no activations
    activations: dict[int, int] = field(default_factory=dict)  # the most beside so much gradient
    gathered: int = 0  # for two blocks of sharded weights and gradients

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def divided(self, split: Split) -> "Memory":
        """Return what each process takes where they share a step.

        FSDP2 holds two blocks whole, gathering the next while one computes, and reduces gradients
        in fp32; DDP holds a copy of the gradients.
        """
        copied = split.shards == 1 and split.replicas > 1
        buckets = {"DDP's buckets": self.states[GRADIENTS]} if copied else {}
        if split.shards == split.sequence == 1:
            return replace(self, parts={**self.parts, **buckets})
        whole = set() if split.teacher_sharded else {"teacher"}
        parts = {
            name: size // (1 if name in whole else split.shards)
            for name, size in self.states.items()
        }
        parts[GRADIENTS], parts["activations"] = max(
            ((g // split.shards, a // split.sequence) for g, a in self.activations.items()),
            key=sum,
        )
        if split.shards > 1:
            parts["gathered blocks"] = self.gathered
        return replace(self, parts={**parts, **buckets, "workspaces": _WORKSPACE})

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {b / GIB:.1f}" for n, b in self.parts.items() if b >= GIB / 20)
        return f"{self.total / GIB:.1f} GiB at the peak, in {self.phase}: {parts}"


def estimate(
    cfg: DictConfig,
    latent: tuple[int, int, int, int],
    text: tuple[int, int],
    *,
    dtype: torch.dtype,
    clips: int,
    weights: torch.dtype = torch.float32,
) -> Memory:
    """Estimate a training step of `clips` latents [C, f, h, w] with text [L, dim] at once.

    `dtype` is that of mixed precision, fp32 for none; `weights` that of student and teacher.
    Kernels are a GPU's, whatever the machine.
    """
    source = build(cfg.model)
    live, like = LiveBytes("meta"), LikeCuda()
    student = _student(cfg, _cast(source.skeleton(), weights), like)
    loss, optimizer = build(cfg.loss), build(cfg.optimizer)
    for tensor in (*student.parameters(), *student.buffers()):
        live.count(tensor, "weights")
    trained = [p for p in student.parameters() if p.requires_grad]
    masks = set(mask_parameters(student).values())
    if cfg.ema:
        live.now["average"] = sum(_bytes(p) for p in trained if p not in masks)
    live.now["optimizer"] = sum(optimizer.state_bytes(p) for p in trained)
    if loss.needs_teacher:
        live.now["teacher"] = _teacher_bytes(build(cfg.teacher), _cast(source.skeleton(), weights))
    states = {**live.now, GRADIENTS: sum(map(_bytes, trained))}
    noised = _noised(latent, text, clips, has_condition=source.condition != "none")
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda p: live.count(p.grad, GRADIENTS) if p.grad is not None else None
        )
    with warnings.catch_warnings(action="ignore"), live, like:
        if cfg.grad_accumulation > 1:  # an earlier part's are there
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                live.count(parameter.grad, GRADIENTS)
        distiller = Distiller(student, _Given(), loss, lambda batch: noised)  # type: ignore[arg-type]
        live.phase = "forward"
        with like.autocast(dtype):
            losses = distiller({})
        live.phase = "backward"
        torch.stack(list(losses.values())).sum().backward()
        del losses
        live.phase = "the optimizer's step"
        nn.utils.clip_grad_norm_(trained, 1.0)
    parts = {name: size for name, size in live.peak.items() if size}
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks_of(student))
    return Memory(
        live.peak_phase,
        {**parts, "workspaces": _WORKSPACE},
        {name: size for name, size in states.items() if size},
        live.most_other,
        2 * largest * (dtype.itemsize + 4),
    )


def estimate_calibration(
    cfg: DictConfig,
    latent: tuple[int, int, int, int],
    text: tuple[int, int],
    *,
    dtype: torch.dtype,
    weights: torch.dtype = torch.float32,
) -> Memory:
    """Estimate the calibration, which every process does with a whole teacher; see `estimate`.

    One sample is measured at one budget. Heads that may choose their order are all in clusters, the
    costliest one; `velocity_exact`, which needs no graph, is taken for `velocity`.
    """
    source, measure = build(cfg.model), build(cfg.allocation).measure
    live, like = LiveBytes("meta"), LikeCuda()
    method = _method(cfg)
    if isinstance(method.layout, PerHead):
        method = replace(method, layout=method.layout.clusters)
        measure = measure or "output"  # by which orders are compared
    if isinstance(method.compensation, FilteredDrop):  # which has no fake, and takes as much
        method = replace(method, compensation=Drop())
    teacher = attach(_cast(source.skeleton(), weights), None).requires_grad_(False).eval()
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        live.count(tensor, "weights")
    heads, width = teacher.config.num_attention_heads, teacher.config.attention_head_dim
    for block in blocks_of(teacher)[1:-1]:  # they are alike: to run two is quicker
        block.forward = lambda hidden, *_: torch.empty_like(hidden)
    sparse = SparseAttention(method, heads, width).to(META)
    visited: list[int] = []

    def visit(seen: Seen) -> None:
        visited.append(seen.index)
        if len(visited) > 1:
            return
        live.phase = "a layer's masks"
        layer = seen.under(sparse)
        mask = layer.mask(layer.attention.policy)
        if measure:
            layer.error(mask)
        coverage(layer.scores)
        mask.captured(layer.mass)
        live.phase = "a block's pass"
        if measure in REPLAYED:  # the first has the most beside it: the inputs of all blocks
            raise _Enough

    clips, at_once = cfg.calibration.clips, cfg.evaluation.batch_size
    sizes = [min(at_once, clips - first) for first in range(0, clips, at_once)]
    with warnings.catch_warnings(action="ignore"), live, like:
        given = [
            _noised(latent, text, size, has_condition=source.condition != "none")
            for size in sizes * len(cfg.calibration.noise_levels)
        ]
        live.now["samples"] = live.now.pop(OTHER)
        first = given[0]
        sample = Sample(0, first.x, first.t, first.text, first.condition, first.velocity)
        live.phase = "a block's pass"
        with like.autocast(dtype), suppress(_Enough):
            visit_layers(
                teacher,
                sample,
                visit,
                measure="velocity" if measure == "velocity_exact" else measure,
                probes=[torch.empty_like(sample.x) for _ in range(cfg.calibration.probes)],
            )
    parts = {name: size for name, size in live.peak.items() if size}
    return Memory(live.peak_phase, {**parts, "workspaces": _WORKSPACE})


def advice(cfg: DictConfig, stage: str = "train") -> str:
    """Name up to three settings of a config that make a stage smaller, the strongest first."""
    clips = cfg.batch_size // cfg.grad_accumulation
    smaller = "a smaller data.height and data.width, or fewer data.frames, with a new data.dir"
    ways = {
        "evaluation.batch_size=1": cfg.evaluation.batch_size > 1,
        "allocation=uniform": stage == "calibrate",
        smaller: True,
        "device=cpu": True,
        "a smaller model": True,
    }
    if stage == "train":
        ways = {
            "gradient_checkpointing=true": not cfg.gradient_checkpointing,
            f"grad_accumulation={cfg.batch_size}": clips > 1,
            "teacher=cached noise_draws=16": cfg.teacher._target_.endswith(
                (".Frozen", ".Offloaded")
            ),
            "optimizer=adamw_8bit": not cfg.optimizer._target_.endswith("8bit"),
            "lora.rank=64": not cfg.lora.rank,
            "ema=0": cfg.ema > 0,
            "a smaller data.frames, data.height or data.width": True,
        }
    return ", ".join([way for way, helps in ways.items() if helps][:3])


def _student(cfg: DictConfig, model: nn.Module, like: LikeCuda) -> nn.Module:
    """Return the student as Job makes it, on the meta device; budgets do not change its memory."""
    if cfg.error_budget is not None or cfg.sparsity > 0:
        attach(model, _method(cfg))
    else:
        attach(model, None)
    if cfg.gradient_checkpointing:
        # As diffusers does by default; `like` is switched off while Tensor.backward runs.
        model.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), like))
        )
    model.requires_grad_(True)
    if cfg.lora.rank:
        insert_adapters(model, cfg.lora)
    return model.to(META).train()


def _method(cfg: DictConfig) -> SparseMethod:
    names = ("layout", "estimator", "policy", "compensation")
    return method_from_spec({**{name: build(cfg[name]) for name in names}, "backend": "auto"})


class _Enough(Exception):
    """Ends a pass whose peak is behind it."""


class _Given:
    """Stands for any teacher: its forward, without gradients, never makes the peak."""

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        return torch.empty_like(noised.velocity)


def _teacher_bytes(teacher: Any, model: nn.Module) -> int:
    """Return what a teacher of this model holds on the GPU while the student's step peaks."""
    whole = sum(map(_bytes, (*model.parameters(), *model.buffers())))
    match teacher:
        case Cached() | Shared() | Offloaded():  # an offloaded one has left before the backward
            return 0
        case Frozen():
            return whole
    kind = type(teacher).__name__
    raise Refusal("teacher", kind, "one that the estimate knows", "add it to train/memory.py")


def _noised(
    latent: tuple[int, ...], text: tuple[int, int], clips: int, *, has_condition: bool
) -> Noised:
    x, target = (torch.empty(clips, *latent, device=META) for _ in range(2))
    return Noised(
        x=x,
        t=torch.empty(clips, device=META),
        velocity=target,
        text=torch.empty(clips, *text, device=META),
        condition=torch.empty_like(x) if has_condition else None,
        index=[0] * clips,
        draw=[0] * clips,
        seeds=[()] * clips,
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model if dtype == torch.float32 else model.to(dtype)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
