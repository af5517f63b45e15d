"""The velocity error on a few held-out clips while a student trains: its learning curve."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from gossamer.train.compiling import compiled
from gossamer.train.config import fingerprint
from gossamer.train.evaluate import relative_errors, velocities
from gossamer.train.measures import Sample
from gossamer.train.samples import evenly, noisy_samples

if TYPE_CHECKING:
    from gossamer.train.job import Job

FIXED = ("model", "data", "codec", "text", "guidance", "evaluation")


@dataclass(frozen=True)
class Watch:
    """Compares a student with what the teacher makes of the samples, every `every` steps."""

    every: int
    samples: list[Sample]
    target: list[Tensor]
    num_levels: int

    def __call__(self, student: nn.Module) -> dict[str, float]:
        """Return the mean relative velocity error; the student is left in training mode."""
        student.eval()
        found = velocities(student, self.samples, "")
        student.train()
        errors = relative_errors(found, self.target, self.samples, self.num_levels)
        return {"heldout_error": float(np.mean(errors))}


def watch_of(job: "Job") -> Watch | None:
    """Return the watch that the config asks for, or None."""
    options = job.cfg.evaluation
    if not options.every:
        return None
    heldout, levels = job.dataset("heldout"), list(options.noise_levels)
    clips = [heldout[i] for i in evenly(len(heldout), options.every_clips)]
    samples = noisy_samples(clips, levels, options.batch_size, job.device)

    def ask() -> list[Tensor]:
        teacher = job.guided(compiled(job.dense(), job.cfg))
        with job.autocast():
            return velocities(teacher, samples, "teacher")

    target = job.once(("watched", fingerprint(job.cfg, FIXED), job.weights_key), ask)
    return Watch(options.every, samples, target, len(levels))
