"""A teacher whose velocities the jobs of a sweep leave each other: same samples, one forward."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save
from torch import Tensor, nn

from gossamer.train.config import fingerprint
from gossamer.train.draws import Noised
from gossamer.train.shared_file import leave, take
from gossamer.train.teacher import Teacher

if TYPE_CHECKING:
    from gossamer.train.job import Job

# What decides a velocity, beside the data, the sample's clip and seed and the teacher's weights.
DECIDING = ("training_data", "noise", "noise_draws", "guidance", "compile", "compile_tuned")
NAME = "velocity"


class Remembered:
    """Asks the teacher once for each batch, whichever job asks, and keeps its answer in a folder.

    One file of fp32 for each batch, named by its samples, so that a job learns the same as alone.
    A disk that takes no more ends the keeping, not the training.
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.is_full = False

    def start(self, job: "Job") -> None:
        """Start the teacher, and find the folder of what decides its velocities."""
        self.teacher.start(job)
        key = json.dumps(
            {
                "settings": fingerprint(job.cfg, DECIDING),
                "data": job.dataset("train").manifest.request,
                "weights": job.weights_key,
                "precision": job.accelerator.mixed_precision,
                "device": job.device.type,
            },
            sort_keys=True,
        )
        self.folder = self.folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        """Return the velocity [B, C, f, h, w], fp32, of a job before or of the teacher."""
        name = hashlib.sha256(json.dumps([noised.index, noised.seeds]).encode()).hexdigest()[:32]
        file = self.folder / f"{name}.safetensors"
        known = take(file, lambda there: load_file(there, device=str(noised.x.device)))
        if known is not None:
            return known[NAME]
        velocity = self.teacher.velocity(student, noised)
        if not self.is_full:
            kept = velocity.cpu().contiguous()
            if kept.isfinite().all():  # a fault that passes must not come back in every job
                self.is_full = not leave(file, save({NAME: kept}))
        return velocity
