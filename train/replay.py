"""One forward pass whose blocks can be run again, one at a time: the memory of checkpointing.

torch.utils.checkpoint would run every block again for each gradient that comes down to it, and
hand out one gradient at a time; here one run serves all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCall:
    """What a block was given and gave; `others` (text, timestep, rotary) depend on no block."""

    block: nn.Module
    hidden: Tensor
    others: tuple[Any, ...]
    out: Tensor


@contextmanager
def blocks_kept(model: nn.Module) -> Iterator[list[BlockCall]]:
    """Run a diffusers transformer's blocks without a graph inside, and list their calls.

    What comes after the blocks has a graph, which ends at the last call's `out`.
    """
    calls: list[BlockCall] = []

    def run(block: nn.Module, hidden: Tensor, *others: Any) -> Tensor:
        with torch.no_grad():
            out = block(hidden, *others)
        calls.append(BlockCall(block, hidden, others, out))
        return out.requires_grad_()

    model.enable_gradient_checkpointing(run)
    try:
        with torch.enable_grad():
            yield calls
    finally:
        model.disable_gradient_checkpointing()


def replay(
    call: BlockCall, inner: nn.Module, gradients: list[Tensor]
) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor]]:
    """Run a block again, and gradients by its output back through it.

    Returns the arguments and the output of the module `inner`, the gradients by this output, and
    those by the block's input.
    """
    seen: list[tuple[Any, ...]] = []
    hidden = call.hidden.detach().requires_grad_()

    def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        seen.append((*args, out))

    with hooked([inner], keep), torch.set_grad_enabled(bool(gradients)):
        out = call.block(hidden, *call.others)
    of_inner, below = [], []
    for left, gradient in zip(reversed(range(len(gradients))), gradients, strict=True):
        both = torch.autograd.grad(out, [seen[0][-1], hidden], gradient, retain_graph=left > 0)
        of_inner.append(both[0])
        below.append(both[1])
    return seen[0], of_inner, below


@contextmanager
def hooked(modules: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a forward hook of modules inside."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
