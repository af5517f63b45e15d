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
        fix = f"set {advice(job.cfg, stage)}"
        used = f"{stage} out of memory on {job.device} ({str(error).splitlines()[0]})"
        raise OutOfMemory("memory", used, _needed(job, stage), fix) from error


def _needed(job: "Job", stage: str) -> str:
    fact = {"train": "memory", "calibrate": "calibration"}.get(stage)
    if fact is None:
        return f"what fits on {job.device}"
    from gossamer.train.check import preflight

    what = "a training step" if stage == "train" else "the calibration"
    return f"room for {what}: {preflight(job.cfg, [stage], plan_memory=True)[fact]}"
