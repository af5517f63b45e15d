"""What a run says when a device is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from gossamer.train.memory import advice
from gossamer.train.refusal import OutOfMemory

if TYPE_CHECKING:
    from gossamer.train.job import Job


@contextmanager
def within_memory(job: "Job", stage: str) -> Iterator[None]:
    """Turn what torch raises for a full device into OutOfMemory, with what could be set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        used = f"{stage} out of memory on {job.device} ({str(error).splitlines()[0]})"
        raise OutOfMemory("memory", used, _needed(job, stage), _settings(job, stage)) from error


def _needed(job: "Job", stage: str) -> str:
    if stage != "train":
        return f"what fits on {job.device}"
    from gossamer.train.check import preflight

    planned = preflight(job.cfg, ["train"], plan_memory=True)["memory"]
    return f"room for a training step: {planned}"


def _settings(job: "Job", stage: str) -> str:
    """Name three settings that need less memory, those that the run does not use yet first."""
    if stage == "train":
        return f"set {advice(job.cfg)}"
    options = {
        "evaluation.batch_size=1": job.cfg.evaluation.batch_size > 1,
        "allocation=uniform": stage == "calibrate",
        "a smaller data.height and data.width, or fewer data.frames, with a new data.dir": True,
        "device=cpu": True,
        "a smaller model": True,
    }
    return f"set {', '.join([setting for setting, helps in options.items() if helps][:3])}"
