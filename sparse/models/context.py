"""What the processors of one transformer share during a forward."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.sequence import SequenceParallel


@dataclass
class AttentionContext:
    """Filled by a pre-hook on the transformer before each forward."""

    grid: TokenGrid | None = None
    timestep: Tensor | None = None  # [B], or [B, S] (Wan 2.2 TI2V)
    branch: str | None = None  # of the guidance, where the pipeline names it
    step_index: int | None = None  # where the pipeline counts its steps
    sigma: float | None = None  # where it says the noise level
    sequence: SequenceParallel | None = None  # where processes share the tokens

    @torch.compiler.disable  # compiled, the recompute of checkpointing would save other tensors
    def attend(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return a layer's attention of q, k, v [B, S, H, D], with their strides.

        Heads change places here: compiled code wants contiguous gradients of what it returns, and
        would copy those of transposed q, k and v.
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        held = next(attention.buffers(), None)
        if held is not None and held.device != q.device:
            _move(attention, q.device)
        call = (q, k, v, self.grid, self.timestep)
        own = self.sequence
        out = attention(*call) if own is None else own.attend(attention, *call)
        return out.transpose(1, 2)


def _move(attention: nn.Module, device: torch.device) -> None:
    """Move what a layer's masks hold: offloading runs it elsewhere than it rests.

    What an offloading hook of its own keeps on meta stays there, for the hook to load.
    """
    attention._apply(lambda x: x if x.is_meta else x.to(device))
