"""What a run says when a device is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from gossamer.train.refusal import OutOfMemory

if TYPE_CHECKING:
    from gossamer.train.job import Job

GB = 1e9


@contextmanager
def within_memory(job: "Job", stage: str) -> Iterator[None]:
    """Turn what torch raises for a full device into OutOfMemory, with what could be set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        used = f"{stage} out of memory on {job.device} ({str(error).splitlines()[0]})"
        raise OutOfMemory("memory", used, _estimate(job), f"set {_settings(job, stage)}") from error


def _estimate(job: "Job") -> str:
    """Say what must fit beside the activations: fp32 weights, gradients, moments, averages."""
    count = sum(p.numel() for p in job.source.skeleton().parameters())
    teacher = "frozen" in str(job.cfg.teacher._target_).lower() and job.is_sparse
    trained = 0 if job.cfg.lora.rank else (3 + bool(job.cfg.ema)) * count
    needed = 4 * (count * (1 + teacher) + trained) / GB
    has = ""
    if job.device.type == "cuda":
        has = f" of the {torch.cuda.get_device_properties(job.device).total_memory / GB:.1f} GB"
    return (
        f"what fits beside about {needed:.2f} GB{has} for weights, gradients, optimizer and teacher"
    )


def _settings(job: "Job", stage: str) -> str:
    """Name three settings that need less memory, those that the run does not use yet first."""
    cfg = job.cfg
    share = cfg.batch_size // (job.accelerator.num_processes * cfg.grad_accumulation)
    for_training = [
        (not cfg.gradient_checkpointing, "gradient_checkpointing=true"),
        (share > 1, f"grad_accumulation={cfg.grad_accumulation * share}"),
        (job.is_sparse, "teacher=offloaded"),
        (not cfg.lora.rank, "lora.rank=32 (teacher=shared then needs no second copy)"),
        (True, "a smaller data.height and data.width, or fewer data.frames, with a new data.dir"),
        (True, "more processes"),
        (True, "a smaller batch_size"),
    ]
    for_other_stages = [
        (cfg.evaluation.batch_size > 1, "evaluation.batch_size=1"),
        (stage == "calibrate", "allocation=uniform"),
        (True, "a smaller data.height and data.width, or fewer data.frames, with a new data.dir"),
        (True, "device=cpu"),
        (True, "a smaller model"),
    ]
    options = for_training if stage == "train" else for_other_stages
    return ", ".join([setting for helps, setting in options if helps][:3])
