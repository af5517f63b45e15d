"""How the blocks that were not selected enter the output."""

from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention


class Drop:
    """Leave unselected blocks out: the softmax is normalised over the selected keys."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str) -> Tensor:
        return block_sparse_attention(q, k, v, blocks, backend=backend)[0]


class Centroid:
    """Let each unselected block enter as one key at its mean (SVG-EAR, arXiv 2603.08982, 4.1)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, backend: str) -> Tensor:
        return compensated_attention(q, k, v, blocks, backend=backend)[0]
