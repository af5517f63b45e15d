"""Modules whose numbers stay fp32 whatever dtype the model is cast to."""

from collections.abc import Callable
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn


def no_autocast(x: Tensor) -> torch.autocast:
    """Keep autocast away from x: a meta tensor's is planned with that of the CPU."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class Fp32Module(nn.Module):
    """Moves with the model, but model.to(torch.bfloat16) leaves its numbers as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._own_numbers()}
        super()._apply(fn, recurse)
        for name, tensor in self._own_numbers():
            tensor.data = before[name].to(tensor.device)
        return self

    def _own_numbers(self) -> list[tuple[str, Tensor]]:
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return list(own)
