"""What the Hopper backends share: ring buffers in Gluon, and the descriptors of TMA copies."""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ELEMENT = {
    torch.float32: gl.float32,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Advance in a ring of buffers; the phase flips when it wraps."""
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


def aligned(x: Tensor) -> Tensor:
    """Return x [B, H, S, D], or a copy that TMA, which steps in 16 bytes, can read."""
    steps = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fits = all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)
    if fits and x.stride(3) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.contiguous()


def describe_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x [B, H, S, D] for copies of `rows` rows of one head."""
    box = (1, 1, rows, x.shape[3])
    # The stride along a dimension of size 1 means nothing, but must be valid.
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[3] = 1
    return TensorDescriptor(x, list(x.shape), strides, list(box), _layout(box, x.dtype))


def describe_matrix(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe a contiguous matrix for copies of `rows` whole rows."""
    box = (rows, x.shape[1])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), _layout(box, x.dtype))


@cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    if dtype == torch.float32:  # no tensor core reads it
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(box))
    return gl.NVMMASharedLayout.get_default_for(list(box), _ELEMENT[dtype])
