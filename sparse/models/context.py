"""What the processors of one transformer share during a forward."""

from dataclasses import dataclass

from torch import Tensor

from gossamer.sparse.layout import TokenGrid


@dataclass
class AttentionContext:
    """Filled by a pre-hook on the transformer before each forward."""

    grid: TokenGrid | None = None
    timestep: Tensor | None = None  # [B], or [B, S] (Wan 2.2 TI2V)
    branch: str | None = None  # of the guidance, where the pipeline names it
    step_index: int | None = None  # where the pipeline counts its steps
