"""One training step: noise, teacher velocity, student velocity, loss."""

import torch
from torch import Tensor, nn

from gossamer.train.draws import Draws
from gossamer.train.losses import Loss
from gossamer.train.model import velocity
from gossamer.train.teacher import Teacher


class Distiller(nn.Module):
    """Compares the sparse student with the dense teacher; the only module given to accelerate."""

    def __init__(
        self, student: nn.Module, teacher: Teacher | None, loss: Loss, draws: Draws
    ) -> None:
        super().__init__()
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"loss={loss.name}: it needs a teacher; pass one")
        self.student = student
        self.teacher = teacher  # no nn.Module: no part of state dict, DDP or optimizer
        self.loss, self.draws = loss, draws

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {name: loss} of a batch with latent, text, index, position and maybe condition.

        `position` [B] numbers the samples of the whole run, `index` [B] the clips of the split.
        """
        noised = self.draws(batch)
        target = None
        if self.loss.needs_teacher and self.teacher is not None:
            with torch.no_grad():
                target = self.teacher.velocity(self.student, noised)
        student = velocity(self.student, noised.x, noised.t, noised.text, noised.condition)
        return {self.loss.name: self.loss(student, target, noised.velocity)}
