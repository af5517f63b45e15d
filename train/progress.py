"""The student in training with all that a checkpoint restores."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import mask_parameters
from gossamer.train import checkpoint
from gossamer.train.density_controller import DensityController
from gossamer.train.health import Health
from gossamer.train.lora import base_of, check_base, trained_state
from gossamer.train.optimizer_state import load_optimizer, optimizer_tensors
from gossamer.train.optimizers import Numbers
from gossamer.train.processes import ALONE, Together
from gossamer.train.refusal import Refusal
from gossamer.train.sharded import local, own_parts, own_rows, shared_like
from gossamer.train.tensor_files import Source

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The student in training and all that a checkpoint restores."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    controller: DensityController
    health: Health
    precision: str = "no"  # that of autocast
    step: int = 0  # optimizer steps done
    ema: dict[str, Tensor] = field(default_factory=dict)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def start_ema(self) -> None:
        """Begin the averages of all but the masks, which keep the density they were given."""
        masks = set(mask_parameters(self.student).values())
        trained = self.named_parameters().items()
        self.ema = {n: p.detach().clone() for n, p in trained if p not in masks}

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        parameters = self.named_parameters()
        trained = [local(parameters[name]) for name in self.ema]
        torch._foreach_lerp_(list(map(local, self.ema.values())), trained, 1 - decay)

    def save(self, folder: Path, keep: int, together: Together = ALONE) -> Path | None:
        """Write a checkpoint; all processes call it. None in all when the disk refused it."""
        tensors, optimizer = optimizer_tensors(self.optimizer, self.named_parameters())
        groups = {"model": trained_state(self.student), "optimizer": tensors}
        if self.ema:
            groups["ema"] = self.ema
        own = {name: own_parts(flat, others=together.is_first) for name, flat in groups.items()}
        state = {
            "step": self.step,
            "optimizer": optimizer,
            "density": self.controller.state,
            "health": self.health.state,
            "base": base_of(self.student),
            "precision": self.precision,
        }
        return checkpoint.save(
            folder,
            self.step,
            tensors=own if together.writes else {},
            state=state,
            keep=keep,
            together=together,
        )

    def restore(self, path: Path) -> None:
        """Take the state of a checkpoint, reading only what this process has of it."""
        tensors, state = checkpoint.read(path)
        check_base(self.student, state.get("base"), path)
        before = state.get("precision", self.precision)
        if before != self.precision:
            allowed = f"{before}, in which {path} was trained"
            fix = f"launch with --mixed_precision {before}, or set name=NEW"
            raise Refusal("mixed_precision", self.precision, allowed, fix)
        load_student(self.student, tensors["model"], path)
        load_optimizer(
            self.optimizer, self.named_parameters(), tensors["optimizer"], state["optimizer"]
        )
        self.ema, own = {}, self.named_parameters()
        for name, tensor in tensors.get("ema", {}).items():
            self.ema[name] = shared_like(tensor, own[name])
        self.controller.load_state(state["density"])
        self.health.load_state(state.get("health", self.health.state))
        self.step = state["step"]


@torch.no_grad()
def load_student(student: nn.Module, state: Mapping[str, Source], path: Path) -> None:
    """Load a checkpoint's student; the mask budgets (its buffers) stay those of the calibration.

    Refusal with the first odd keys when the checkpoint is of another model.
    """
    own = trained_state(student)
    odd = sorted(set(own) ^ set(state))
    odd += sorted(n for n in set(own) & set(state) if own[n].shape != state[n].shape)
    if odd:
        raise Refusal(
            "checkpoint",
            path,
            f"a checkpoint of this model ({len(odd)} tensors differ: {', '.join(odd[:5])})",
            "use the recipe and model that wrote it, or another run name",
        )
    budgets = {name for name, _ in student.named_buffers() if name in own}
    if any(not torch.equal(own[name].cpu(), state[name][...]) for name in budgets):
        log.warning("%s was trained with other mask budgets than the calibration's", path)
    for name in own.keys() - budgets:
        local(own[name]).copy_(own_rows(state[name], own[name]))


def parameter_groups(student: nn.Module, settings: Numbers) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the model's weights, and the mask parameters without decay."""
    masks = [p for p in mask_parameters(student).values() if p.requires_grad]
    groups = [
        {
            "params": [p for p in student.parameters() if p.requires_grad and p not in set(masks)],
            "lr_multiple": 1.0,
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [p for p in masks if p.ndim == 1],
            "lr_multiple": settings.mask_numbers,
            "weight_decay": 0.0,
        },
        {
            "params": [p for p in masks if p.ndim > 1],
            "lr_multiple": settings.mask_matrices,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
