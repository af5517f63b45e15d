"""Sequence parallelism over heads (DeepSpeed-Ulysses, arXiv 2309.14509).

P processes share the tokens of one sample. Around each attention they exchange tokens for heads:
each attends over all tokens with H / P heads. Masks are per head, so nothing else is sent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.sparse.layout import TokenGrid


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """This process's part of the tokens and of the heads among those of its group.

    Every process of the group computes the loss of the whole sample; the gradients of the
    parameters must be averaged over all processes, of the group and of others.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def heads(self, num_heads: int) -> slice:
        """Return which of the heads are this process's."""
        own = num_heads // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def cut(self, x: Tensor) -> Tensor:
        """Return this process's tokens of x [B, S, ...]."""
        if x.shape[1] % self.size:
            raise ValueError(
                f"tokens={x.shape[1]}: allowed is a multiple of sequence_parallel={self.size}; "
                "change the clip size or sequence_parallel"
            )
        return x.chunk(self.size, 1)[self.rank]

    def join(self, x: Tensor) -> Tensor:
        """Return all tokens [B, S, C] of each process's x [B, S / P, C]."""
        return _Join.apply(x, self)

    def attend(
        self,
        attention: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid | None,
        timestep: Tensor | None,
    ) -> Tensor:
        """Return attention over all tokens of these ones, q, k, v [B, H, S / P, D]."""
        num_heads = q.shape[1]
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        with only_heads(attention, self.heads(num_heads), num_heads):
            out = attention(q, k, v, grid, timestep)
        return self._to_tokens(out)

    def at_own_heads(self, module: nn.Module, num_heads: int, measure: Callable[[], Tensor]) -> Any:
        """Return P times what `measure` gives for this process's heads [..., H / P], 0 for others.

        The mean over the processes is then the measure of all heads [..., H].
        """
        heads = self.heads(num_heads)
        with only_heads(module, heads, num_heads):
            own = measure()
        whole = own.new_zeros(*own.shape[:-1], num_heads)
        whole[..., heads] = own * self.size
        return whole

    def _to_heads(self, x: Tensor) -> Tensor:
        """Turn [B, H, S / P, D] into [B, H / P, S, D]."""
        parts = x.transpose(1, 2).unflatten(2, (self.size, -1)).movedim(2, 0)  # [P, B, s, h, D]
        got = _Exchange.apply(parts, self.group)
        return got.movedim(0, 1).flatten(1, 2).transpose(1, 2)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Turn [B, H / P, S, D] into [B, H, S / P, D]."""
        parts = x.transpose(1, 2).unflatten(1, (self.size, -1)).movedim(1, 0)  # [P, B, s, h, D]
        got = _Exchange.apply(parts, self.group)
        return got.movedim(0, 2).flatten(2, 3).transpose(1, 2)


@contextmanager
def only_heads(module: nn.Module, heads: slice, num_heads: int) -> Iterator[None]:
    """Let a module with tensors per head, [H, ...], see some of its heads inside the block.

    What a part names in `of_all_heads` is no tensor per head, and stays whole.
    """
    whole: list[tuple[dict[str, Any], str, Tensor]] = []
    with torch.enable_grad():  # as checkpointing's first forward runs without
        for part in module.modules():
            whole_ones = getattr(part, "of_all_heads", ())
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and name not in whole_ones:
                        assert tensor.shape[0] == num_heads, (type(part), name)
                        whole.append((store, name, tensor))
                        store[name] = tensor[heads]
    try:
        yield
    finally:
        for store, name, tensor in whole:
            store[name] = tensor


class _Exchange(torch.autograd.Function):
    """Part i of x [P, ...] goes to process i; part i of the result came from process i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Join(torch.autograd.Function):
    """All tokens of each process's. Each of the P losses is the whole one, so that its gradient
    counts P times in the mean over the processes that the gradients' own share is taken of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(sequence.size)]
        dist.all_gather(parts, x, group=sequence.group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.cut(grad) * ctx.sequence.size, None
