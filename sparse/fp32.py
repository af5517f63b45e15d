"""Modules whose numbers stay fp32 whatever dtype the model is cast to."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn


def no_autocast(x: Tensor) -> torch.autocast:
    """Keep autocast away from x: a meta tensor's is planned with that of the CPU."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class Fp32Module(nn.Module):
    """Moves with the model, but model.to(torch.bfloat16) leaves its numbers as they are."""

    def for_heads(self, num_heads: int, head_dim: int | None = None) -> Self:
        """Return a copy with its own numbers for each of the heads."""
        own = deepcopy(self)
        for name, number in own._own_numbers():
            number.data = of_heads(name, number.data, num_heads)
        return own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._own_numbers()}
        super()._apply(fn, recurse)
        for name, tensor in self._own_numbers():
            tensor.data = before[name].to(tensor.device)
        return self

    def _own_numbers(self) -> list[tuple[str, Tensor]]:
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return list(own)


def of_heads(field: str, value: Tensor, num_heads: int) -> Tensor:
    """Return a copy of a part's numbers [H] or [1] as [num_heads]."""
    if value.numel() not in (1, num_heads):
        raise ValueError(
            f"{field}={value.tolist()}: allowed is one number for all heads, or one for each of "
            f"the {num_heads} heads; set num_heads=1 or num_heads={num_heads}"
        )
    return value.expand(num_heads).clone()
