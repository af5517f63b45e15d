"""What updates the weights: one YAML each in conf/optimizer/, all with the numbers of AdamW."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gossamer.train import sharded
from gossamer.train.refusal import Refusal

_8BIT_FROM = 4096  # bitsandbytes keeps the moments of smaller tensors in fp32
_8BIT_BLOCK = 256  # values that share one fp32 scale


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How fast the weights move, and along which schedule."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 10
    final_lr: float = 0.1  # share of lr that the cosine ends at
    clip: float = 1.0
    mask_numbers: float = 100.0  # learning rate of a head's own mask numbers, in multiples of lr
    mask_matrices: float = 10.0  # and of the matrices of its mask


class AdamW(Numbers):
    """torch's AdamW (arXiv 1711.05101): two moments of the weights' dtype.

    On a GPU it is the fused one, of the same formula: the others also hold the square roots of all
    second moments, 4 bytes a parameter, during the step.
    """

    def check(self) -> None:
        """Refuse what this machine cannot run; imports nothing."""

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups; their learning rates are set at each step."""
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        return sharded.AdamW(groups, betas=self.betas, fused=on_gpu or None)

    def state_bytes(self, parameter: Tensor) -> int:
        """Return what is kept for a parameter from step to step."""
        return 2 * parameter.element_size() * parameter.numel()


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits, by bitsandbytes (arXiv 2110.02861): 2 bytes a parameter.

    Its state is plain tensors, which checkpoints hold as they are.
    """

    def check(self) -> None:
        """Refuse where bitsandbytes is not installed; imports nothing."""
        if find_spec("bitsandbytes") is None:
            raise _refuse()

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups, whole tensors all.

        Raises Refusal without bitsandbytes, and for parameters that are sharded.
        """
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        except ImportError as error:
            raise _refuse() from error
        if any(hasattr(p, "device_mesh") for group in groups for p in group["params"]):
            allowed = "adamw where parameters are sharded (FSDP)"
            raise Refusal("optimizer", "adamw_8bit", allowed, "set optimizer=adamw")
        optimizer: torch.optim.Optimizer = Optimizer(groups, betas=self.betas)
        return optimizer

    def state_bytes(self, parameter: Tensor) -> int:
        """Return what is kept for a parameter from step to step."""
        count = parameter.numel()
        if count < _8BIT_FROM:
            return super().state_bytes(parameter)
        return 2 * (count + 4 * -(-count // _8BIT_BLOCK))


def _refuse() -> Refusal:
    allowed = "adamw where bitsandbytes is not installed"
    return Refusal("optimizer", "adamw_8bit", allowed, "pip install gossamer[eight-bit]")
