"""What a head's sparsity does to the dense teacher: the errors that calibration weighs.

`velocity` is the effect on the model's velocity to first order: with random probes u on it and
g = d(u . v)/d(out) from one backward pass, E[(g . change)^2] is the squared velocity error when
only this head is sparse (Hutchinson), so one backward a probe serves every layer, head and budget.
`velocity_exact` is the same error by one forward pass for each head and budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.allocation import Measure
from gossamer.sparse.attach import attentions, transformer_of
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.fp32 import no_autocast
from gossamer.sparse.layout import BlockLayout, permute_qkv
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal
from gossamer.train.replay import blocks_kept, hooked, replay


@dataclass(frozen=True)
class Sample:
    """Noisy inputs of one noise level: x [B, C, f, h, w], t [B], text [B, L, dim]."""

    level: int
    x: Tensor
    t: Tensor
    text: Tensor
    condition: Tensor | None
    target: Tensor | None = None  # noise - latent, for the Fisher weights


REPLAYED = ("fisher", "velocity", "velocity_exact")  # measures that run each block again
Effect = Callable[["Layer", Tensor], Tensor]  # layer, change of its output [B, H, S, D] -> [B, H]


@dataclass
class Layer:
    """One layer's dense attention on one sample, in block order, and how to weigh its changes."""

    index: int
    attention: SparseAttention
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scores: BlockScores
    effect: Effect | None = None  # None: the attention mass is all that counts

    @cached_property
    def mass(self) -> Tensor:
        """Return the true attention mass of each pair of blocks [B, H, Nq, Nk]."""
        layouts = self.scores.q_layout, self.scores.kv_layout
        return Oracle()(self.q, self.k, self.v, *layouts).score

    def mask(self, policy: Hybrid) -> BlockMask:
        return keep_text(policy(self.scores))

    def error(self, mask: BlockMask) -> Tensor:
        """Return what is lost with the mask, by head [B, H], fp64."""
        if self.effect is None:
            return (1 - mask.captured(self.mass)).double()
        out = self.attention.attend(self.q, self.k, self.v, mask)
        change = (out - self.out).float()
        return self.effect(self, change).double()


@dataclass(frozen=True)
class Seen:
    """One layer's dense attention on one sample: q, k, v, grid, timestep and output."""

    index: int
    call: tuple[Any, ...]
    effect: Callable[[BlockLayout], Effect | None]  # of q's blocks

    @torch.no_grad()
    def under(self, attention: SparseAttention) -> Layer:
        """Return it in the block order of the layer's sparse attention."""
        query, key, value, grid, _, out = self.call
        with no_autocast(query):
            q, k, v = (x.detach() for x in (query, key, value))
            q_layout, kv_layout = attention.layout(q, k, v, grid)
            q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
            scores = attention.estimator(q, k, v, q_layout, kv_layout)
            out = q_layout.permute(out.detach())
        return Layer(self.index, attention, q, k, v, out, scores, self.effect(q_layout))


def visit_layers(
    teacher: nn.Module,
    sample: Sample,
    visit: Callable[[Seen], None],
    *,
    measure: Measure | None,
    probes: Sequence[Tensor] = (),
) -> None:
    """Call `visit` for each layer of a densely attached teacher on one sample.

    Probes are random [B, C, f, h, w], for the velocity to first order. No more than one layer's
    tensors are held at a time: what needs neither gradients nor more forward passes is visited in
    the forward pass, else each block is run again, the last first, and only their inputs are kept.
    """
    modules = list(attentions(teacher).values())
    if measure not in REPLAYED:

        def now(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            index = modules.index(module)
            effect = _effect_now(measure, teacher, index)
            visit(Seen(index, (*args, out), lambda order: effect))

        with hooked(modules, now), torch.no_grad():
            velocity(teacher, sample.x, sample.t, sample.text, sample.condition)
        return
    with blocks_kept(teacher) as calls:
        v = velocity(teacher, sample.x, sample.t, sample.text, sample.condition)
        gradients = _gradients(measure, v, sample, calls[-1].out, probes)
    v = v.detach()
    for index, module in reversed(list(enumerate(modules))):
        call, own, gradients = replay(calls.pop(), module, gradients)
        if measure == "velocity_exact":
            visit(Seen(index, call, partial(_Replaced, teacher, module, sample, v)))
        else:
            visit(Seen(index, call, partial(_projected, own, measure == "velocity")))
        del call, own  # before the next block's graph


def _gradients(
    measure: Measure, v: Tensor, sample: Sample, out: Tensor, probes: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients by the last block's output: of each probe, or of the training loss."""
    match measure:
        case "velocity_exact":
            return []
        case "fisher":
            assert sample.target is not None
            loss = (v - sample.target).square().flatten(1).mean(1).sum()  # one loss a clip
            return list(torch.autograd.grad(loss, out))
    norm = v.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    along = [(probe / norm * v).sum() for probe in probes]
    return [torch.autograd.grad(one, out, retain_graph=True)[0] for one in along]


@dataclass(frozen=True)
class _Projected:
    """The change along gradients: squared as a whole (probes) or by element (diagonal Fisher)."""

    as_a_whole: bool
    gradients: list[Tensor]  # in block order

    def __call__(self, layer: Layer, change: Tensor) -> Tensor:
        squares = [
            product.sum((2, 3)).square() if self.as_a_whole else product.square().sum((2, 3))
            for product in (gradient * change for gradient in self.gradients)  # one at a time
        ]
        return torch.stack(squares).mean(0)


def _projected(gradients: list[Tensor], as_a_whole: bool, order: BlockLayout) -> _Projected:
    return _Projected(as_a_whole, [order.permute(gradient).float() for gradient in gradients])


@dataclass(frozen=True)
class _Replaced:
    """The change of the velocity when one head's output is replaced: a forward pass a head."""

    teacher: nn.Module
    module: nn.Module
    sample: Sample
    velocity: Tensor
    order: BlockLayout

    @torch.no_grad()
    def __call__(self, layer: Layer, change: Tensor) -> Tensor:
        change = self.order.unpermute(change)
        norm = self.velocity.flatten(1).norm(dim=1)
        errors = []
        for head in range(change.shape[1]):

            def replace(module: nn.Module, args: Any, out: Tensor, head: int = head) -> Tensor:
                out = out.clone()
                out[:, head] += change[:, head].to(out.dtype)
                return out

            with hooked([self.module], replace):
                s = self.sample
                v = velocity(self.teacher, s.x, s.t, s.text, s.condition)
            errors.append(((v - self.velocity).flatten(1).norm(dim=1) / norm).square())
        return torch.stack(errors, dim=1)


def _effect_now(measure: Measure | None, teacher: nn.Module, index: int) -> Effect | None:
    match measure:
        case None | "mass":
            return None
        case "relative_l1":
            return _relative_l1
        case _:
            return _Output(_output_projection(teacher, index))


def _relative_l1(layer: Layer, change: Tensor) -> Tensor:
    return change.abs().sum((2, 3)) / layer.out.float().abs().sum((2, 3))


@dataclass(frozen=True)
class _Output:
    """The change after the output projection, relative to all heads' output of the layer."""

    weight: Tensor  # [dim, H * D]

    def __call__(self, layer: Layer, change: Tensor) -> Tensor:
        heads, width = change.shape[1], change.shape[3]
        by_head = self.weight.unflatten(1, (heads, width)).transpose(0, 1)  # [H, dim, D]
        gram = by_head.mT @ by_head
        squared = torch.einsum("bhsd,hde,bhse->bh", change, gram, change)
        whole = layer.out.float().transpose(1, 2).flatten(2) @ self.weight.T  # [B, S, dim]
        return squared / whole.square().sum((1, 2))[:, None]


def _output_projection(teacher: nn.Module, index: int) -> Tensor:
    name = list(attentions(teacher))[index]
    layer = transformer_of(teacher).get_submodule(name)
    if not hasattr(layer, "to_out"):
        raise Refusal(
            "allocation.measure",
            "output",
            "fisher or velocity for this model",
            f"{name} has no to_out",
        )
    return layer.to_out[0].weight.detach().float()  # type: ignore[index]
