"""Permute: bring the tokens of q, k and v into block order and back, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import check_triton, stands_for_gpu

BACKENDS = ("reference", "triton")
_MAX_TENSORS = 3


def permute(
    tensors: Sequence[Tensor], orders: Sequence[Tensor | None], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Return y with y[b, h, i] = x[b, h, order[b, h, i]] for each x; differentiable, no sync.

    Results are contiguous and hold x's bits. An order of None gives x itself.

    Args:
        tensors: one to three [B, H, S, D], alike but for S; any strides, fastest if D's is 1.
        orders: for each, the token at each position: int32 or int64, [S], or [B, H, S] for one
            order per batch and head; on a GPU taken on trust to hold every token once.
        backend: "reference" (plain PyTorch, any device), "triton" (2 or 4 bytes an element) or
            "auto", triton on CUDA where the type allows it.

    Raises:
        ValueError: naming field, value, allowed values and the fix, before any work.
    """
    return _move(tensors, orders, backend, inverse=False)


def unpermute(
    tensors: Sequence[Tensor], orders: Sequence[Tensor | None], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Undo `permute` with the same orders: y[b, h, order[b, h, i]] = x[b, h, i]."""
    return _move(tensors, orders, backend, inverse=True)


def _move(
    tensors: Sequence[Tensor], orders: Sequence[Tensor | None], backend: str, inverse: bool
) -> tuple[Tensor, ...]:
    if not 1 <= len(tensors) <= _MAX_TENSORS or len(orders) != len(tensors):
        raise ValueError(
            f"tensors must be one to {_MAX_TENSORS} with one order each, got {len(tensors)} "
            f"tensors and {len(orders)} orders; pass None as the order of a tensor to leave as is"
        )
    moving = [i for i, order in enumerate(orders) if order is not None]
    results = list(tensors)
    if moving:
        xs = [tensors[i] for i in moving]
        used = [order for order in orders if order is not None]
        backend = _choose_backend(backend, xs)
        for x, order in zip(xs, used, strict=True):
            _check(x, order, xs[0])
        match backend:
            case "reference":
                from .reference import forward
            case _:
                from .triton import forward
        for i, y in zip(moving, forward(xs, used, inverse), strict=True):
            results[i] = y
    return tuple(results)


def _choose_backend(backend: str, tensors: Sequence[Tensor]) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}; use 'auto'"
        )
    fits = all(x.element_size() in (2, 4) for x in tensors)
    if backend == "auto":
        backend = "triton" if stands_for_gpu(tensors[0].device) and fits else "reference"
    if backend == "triton":
        if not fits:
            raise ValueError(
                "dtype must have 2 or 4 bytes for backend 'triton', got "
                f"{', '.join(str(x.dtype) for x in tensors)}; use backend='reference' or 'auto'"
            )
        check_triton(tensors[0].device, torch.int32)  # bits are moved, whatever the type
    return backend


def _check(x: Tensor, order: Tensor, first: Tensor) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"tensors must be non-empty [B, H, S, D], got shape {list(x.shape)}; "
            "transpose or unflatten it first"
        )
    if (*x.shape[:2], x.shape[3]) != (*first.shape[:2], first.shape[3]) or x.device != first.device:
        raise ValueError(
            "tensors must share batch, heads, head dim and device, got "
            f"{list(first.shape)} on {first.device} and {list(x.shape)} on {x.device}; "
            "permute them in separate calls"
        )
    if order.dtype not in (torch.int32, torch.int64) or order.device != x.device:
        raise ValueError(
            f"orders must be int32 or int64 on the tensors' device {x.device}, got {order.dtype} "
            f"on {order.device}; convert it"
        )
    if order.shape not in ((x.shape[2],), x.shape[:3]):
        raise ValueError(
            f"orders must be [{x.shape[2]}] or {list(x.shape[:3])} to match their tensor, "
            f"got {list(order.shape)}; take it from the layout of these tokens"
        )
    if order.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.equal(order.sort(dim=-1).values, torch.arange(x.shape[2]).expand_as(order)):
        raise ValueError(
            f"orders must hold each of the tokens 0 to {x.shape[2] - 1} once, got one that does "
            "not; build it with argsort"
        )
