"""One training step: noise, teacher velocity, student velocity, loss."""

import torch
from torch import Tensor, nn

from gossamer.train.losses import Loss
from gossamer.train.model import velocity
from gossamer.train.noise import NoiseLevels, add_noise, sample_noise


class Distiller(nn.Module):
    """Compares the sparse student with the dense teacher; the only module given to accelerate."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: Loss,
        noise: NoiseLevels,
        seed: int,
    ) -> None:
        super().__init__()
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"loss={loss.name}: it needs a teacher; pass one")
        self.student = student
        self.teacher: nn.Module | None
        self.__dict__["teacher"] = teacher  # frozen: no part of state dict, DDP or optimizer
        self.loss, self.noise, self.seed = loss, noise, seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {name: loss} of a batch with latent, text, position [B] and maybe condition.

        `position` numbers the samples of the whole run and seeds their noise.
        """
        latent, text, condition = batch["latent"], batch["text"], batch.get("condition")
        seeds = [(self.seed, int(position)) for position in batch["position"].tolist()]
        t, noise = sample_noise(self.noise, latent, seeds)
        x = add_noise(latent, noise, t)
        target = None
        if self.loss.needs_teacher and self.teacher is not None:
            with torch.no_grad():
                target = velocity(self.teacher, x, t, text, condition)
        student = velocity(self.student, x, t, text, condition)
        return {self.loss.name: self.loss(student, target, noise - latent)}
