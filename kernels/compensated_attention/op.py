"""Compensated attention: exact on the selected blocks, one centroid for every other block."""

import torch
from torch import Tensor

from ..block_sparse_attention.op import backend_for
from ..blocks import Blocks
from ..check import check_attention


def compensated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] and lse [B, H, Sq] of one softmax, as in SVG-EAR.

    It runs over the tokens of the selected blocks and, for each other kv block of n > 0 tokens, one
    column with the logit scale * q . mean(k) + ln n + bias + gate and the value mean(v), which
    stands for the tokens left out. Differentiable in q, k, v, bias and gate; the gradient reaches
    k and v also through the means. The lse is a natural logarithm in fp32 (fp64 for fp64 inputs).

    Args:
        q: [B, H, Sq, D].
        k: [B, H, Sk, D], of q's dtype and device; v has its shape.
        blocks: the selected kv blocks of each q block; on a GPU its offsets are taken on trust.
        scale: factor on q k^T; 1 / sqrt(D) if left out.
        bias: [B, H, Nq, Nk] in the dtype of the lse, for the columns of each pair of blocks; -inf
            takes a column away.
        gate: [H] in the dtype of the lse, for all columns of a head: the logarithm of a factor.
        backend: as in `block_sparse_attention`; "triton" and "hopper" round the means to q's dtype
            and share the kernels of the columns.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    scale = check_attention(q, k, v, blocks, scale)
    pairs = blocks.kv_indices.shape
    _check_logit("bias", bias, tuple(pairs), q)
    _check_logit("gate", gate, (q.shape[1],), q)
    backend = backend_for(backend, q, blocks)
    if gate is not None:
        gate = gate[:, None, None]  # [H, 1, 1]
        bias = gate.expand(pairs) if bias is None else bias + gate
    match backend:
        case "reference":
            from . import reference

            return reference.forward(q, k, v, bias, blocks, scale)
        case _:
            from . import operator

            return operator.forward(q, k, v, bias, blocks, scale, backend)


def _check_logit(name: str, x: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x is not None and (x.shape != shape or x.dtype != dtype or x.device != q.device):
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {q.device}, got {x.dtype} {list(x.shape)} on "
            f"{x.device}; expand or convert it"
        )
