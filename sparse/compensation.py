"""How the blocks that were not selected enter the output."""

from torch import Tensor

from gossamer.kernels.blocks import Blocks
from gossamer.kernels.centroid_attention.op import centroid_attention
from gossamer.kernels.merge import merge


class Drop:
    """Leave unselected blocks out: the softmax is normalised over the selected keys."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, out: Tensor, lse: Tensor
    ) -> Tensor:
        return out


class Centroid:
    """Let each unselected block enter as one key at its mean (SVG-EAR, arXiv 2603.08982, 4.1)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, out: Tensor, lse: Tensor
    ) -> Tensor:
        """Merge the exact part (out [B, H, S, D], lse [B, H, S]) with the centroid part."""
        rest, rest_lse = centroid_attention(q, k, v, blocks)
        return merge(out, lse, rest, rest_lse)[0]
