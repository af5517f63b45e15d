"""What the student's velocity is compared with."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Loss(Protocol):
    """A named loss; one that needs no teacher gets None for its velocity."""

    name: str
    needs_teacher: bool

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        """Return the mean loss of velocities [B, C, f, h, w]; target is noise - latent."""


@dataclass(frozen=True, kw_only=True)
class VelocityDistillation:
    """Mean squared error to the dense teacher's velocity (SpargeAttention2, L_VD)."""

    name: str = "velocity_distillation"
    needs_teacher: bool = True

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        assert teacher is not None
        return (student - teacher).square().mean()


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Mean squared error to noise - latent: trains teachers and the diffusion-loss control."""

    name: str = "flow_matching"
    needs_teacher: bool = False

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        return (student - target).square().mean()
