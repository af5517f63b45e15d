"""What the layers keep of a forward, for the recompute of gradient checkpointing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

from torch import Tensor

from gossamer.sparse.gates import Band
from gossamer.sparse.mask import BlockMask


@dataclass(eq=False)
class Kept:
    """What one layer keeps of one forward: its mask, and the band around each row's threshold."""

    is_dense: bool = False
    is_brief: bool = False  # nobody asks again: the mask goes once the layer is computed
    mask: BlockMask | None = None
    band: Band | None = None


class Keeper(Protocol):
    """A layer; `kept` is None where a backward needs what a later forward has replaced."""

    kept: Kept | None


class Pending:
    """A forward whose backward is still to come, maybe after other forwards.

    Those keep masks of their own in the layers. `restore`, a hook on the forward's output, puts
    back the masks of this one as its backward begins. From then on the layers alone hold them, so
    that no mask lives longer than it would without.
    """

    def __init__(self, layers: Sequence[Keeper]) -> None:
        self._layers = layers
        self._held = [layer.kept for layer in layers if layer.kept is not None]
        self._kept = [ref(kept) for kept in self._held]

    def restore(self, grad: Tensor) -> None:
        """Let the recompute of this forward find its masks."""
        for layer, kept in zip(self._layers, self._kept, strict=True):
            layer.kept = kept()
        self._held.clear()
