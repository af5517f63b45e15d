"""Counts the bytes of live tensors while code runs, on any device: the meta device plans a GPU.

`torch.distributed._tools.mem_tracker` does the like with fake CUDA tensors, which a CPU build of
torch cannot differentiate.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes that the CUDA allocator rounds up to
OTHER = "activations"  # all that nothing else is said of
GRADIENTS = "gradients"

# What CUDA's autocast casts down, as far as models here use it. What it casts up (norms, softmax)
# they cast up themselves.
_CAST_DOWN: frozenset[Any] = frozenset(
    {
        F.linear,
        F.conv3d,
        torch.matmul,
        torch.bmm,
        torch.mm,
        torch.addmm,
        torch.baddbmm,
        Tensor.matmul,
        Tensor.__matmul__,
        F.scaled_dot_product_attention,
    }
)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make on a device while they live; `peak` at the worst.

    Memory that an operator takes and gives back inside itself is not seen.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.phase = ""
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_phase = ""
        self.most_other: dict[int, int] = {}  # beside so many bytes of gradients
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor):
                self.count(found)
        return result

    def count(self, tensor: Tensor, kind: str = OTHER) -> None:
        """Count a tensor's storage, if it is not known, or move it to another kind."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            weakref.finalize(storage, self._forget, key)
            self._add(key, kind, -(-storage.nbytes() // BLOCK) * BLOCK)
        elif kind != OTHER:
            self._add(key, kind, self._forget(key))

    def _add(self, key: int, kind: str, size: int) -> None:
        self._known[key] = kind, size
        self.now[kind] += size
        beside = self.now[GRADIENTS]
        self.most_other[beside] = max(self.most_other.get(beside, 0), self.now[OTHER])
        if self.now.total() > self.peak.total():
            self.peak, self.peak_phase = self.now.copy(), self.phase

    def _forget(self, key: int) -> int:
        kind, size = self._known.pop(key)
        self.now[kind] -= size
        return size


class LikeCuda(TorchFunctionMode):
    """Makes meta tensors go the way of CUDA's: attention without logits, and CUDA's autocast.

    Meta tensors have no autocast of their own; that of the CPU says where it is on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._kept: list[Tensor] | None = None

    @contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """Cast to the dtype inside, and keep the casts of weights that train until the end."""
        self._kept = []
        try:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                yield
        finally:
            self._kept = None
            self._casts.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CAST_DOWN and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            args = tuple(self._cast(x, dtype) for x in args)
            kwargs = {name: self._cast(x, dtype) for name, x in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta or x.dtype != torch.float32:
            return x
        if not (x.requires_grad and x.is_leaf):
            return x.to(dtype)
        cast = self._casts.get(id(x))
        if cast is None:
            cast = self._casts[id(x)] = x.to(dtype)
            if self._kept is not None:
                self._kept.append(cast)
        return cast


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Tensor:
    if attn_mask is not None or not query.is_meta:
        call = (query, key, value, attn_mask, dropout_p, is_causal)
        return F.scaled_dot_product_attention(*call, scale=scale, **more)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out
