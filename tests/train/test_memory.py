"""The memory estimate against what the allocator gave two real steps, by torch's CPU profiler."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gossamer.sparse.attach import attach, method_from_spec
from gossamer.train.config import build, compose
from gossamer.train.distiller import Distiller
from gossamer.train.draws import Draws
from gossamer.train.loop import TrainSettings, parameter_groups
from gossamer.train.lora import add_adapters
from gossamer.train.memory import estimate
from gossamer.train.teacher import Frozen

LATENT, TEXT = (4, 4, 16, 16), (16, 32)  # 256 tokens


def config(*more: str) -> Any:
    """Return a run of a small Wan whose heads and blocks Triton takes."""
    return compose(
        [
            "device=cpu",
            "model=scratch_wan",
            "model.num_layers=3",
            "model.num_heads=2",
            "model.head_dim=32",
            "model.ffn_dim=256",
            "model.channels=4",
            "model.text_dim=32",
            "layout=row_major",
            "layout.q_block=64",
            "layout.kv_block=64",
            "batch_size=1",
            "sparsity=0.5",
            "policy.k=0.5",
            "backend=triton",
            *more,
        ]
    )


def real_step(cfg: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return the student as Job makes it, on the CPU, and a function that does a step."""
    source = build(cfg.model)
    student = source.load(0)
    names = ("layout", "estimator", "policy", "compensation", "backend")
    method = method_from_spec({name: cfg[name] for name in names}) if cfg.sparsity else None
    attach(student, method)
    if cfg.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    student.requires_grad_(True).train()
    if cfg.lora.rank:
        add_adapters(student, cfg.lora, 0)
    loss, teacher = build(cfg.loss), build(cfg.teacher)
    if not loss.needs_teacher:
        teacher = None
    elif isinstance(teacher, Frozen):
        teacher.model = attach(source.load(0), None).requires_grad_(False).eval()
    else:
        teacher.job = type("OfShared", (), {"guided": staticmethod(lambda model: model)})
    distiller = Distiller(student, teacher, loss, Draws(levels=build(cfg.noise)))
    optimizer = build(cfg.optimizer).make(
        parameter_groups(student, TrainSettings(steps=1, batch_size=1))
    )
    batch = {
        "latent": torch.randn(1, *LATENT),
        "text": torch.randn(1, *TEXT),
        "index": torch.zeros(1, dtype=torch.long),
        "position": torch.zeros(1, dtype=torch.long),
    }

    def step() -> None:
        for _ in range(cfg.grad_accumulation):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                losses = distiller(batch)
            torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return student, step


def measured(cfg: Any, dtype: torch.dtype) -> int:
    """Return the most bytes that the allocator had given at once during two steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        _, step = real_step(cfg, dtype)
        step()
        step()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (["sparsity=0.0"], torch.float32),
        (["sparsity=0.0", "gradient_checkpointing=true"], torch.float32),
        (["sparsity=0.0", "gradient_checkpointing=true"], torch.bfloat16),
        (["sparsity=0.0", "loss=flow_matching"], torch.bfloat16),
        ([], torch.float32),
        (["gradient_checkpointing=true", "compensation=drop"], torch.float32),
        (["sparsity=0.0", "lora.rank=4", "teacher=shared"], torch.bfloat16),
        (["sparsity=0.0", "grad_accumulation=2", "batch_size=2"], torch.float32),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)[6:],
)  # fmt: skip
def test_the_estimate_is_within_2_percent_of_what_two_steps_allocate(
    settings: list[str], dtype: torch.dtype, one_thread: None
) -> None:
    cfg = config(*settings)
    found = estimate(cfg, LATENT, TEXT, dtype=dtype, clips=1)
    planned = found.total - found.parts["workspaces"]  # cuBLAS's
    truth = measured(cfg, dtype)
    assert abs(planned / truth - 1) < 0.02, (planned, truth, str(found.parts))
