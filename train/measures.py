"""What a head's sparsity does to the dense teacher: the errors that calibration weighs.

`velocity` is the effect on the model's velocity to first order: with random probes u on it and
g = d(u . v)/d(out) from one backward pass, E[(g . change)^2] is the squared velocity error when
only this head is sparse (Hutchinson), so one backward a probe serves every layer, head and budget.
`velocity_exact` is the same error by one forward pass for each head and budget.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.allocation import Measure
from gossamer.sparse.attach import attentions, transformer_of
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.fp32 import no_autocast
from gossamer.sparse.layout import permute_qkv
from gossamer.sparse.mask import BlockMask, BlockScores, keep_text
from gossamer.sparse.policies import Hybrid
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal


@dataclass(frozen=True)
class Sample:
    """Noisy inputs of one noise level: x [B, C, f, h, w], t [B], text [B, L, dim]."""

    level: int
    x: Tensor
    t: Tensor
    text: Tensor
    condition: Tensor | None
    target: Tensor | None = None  # noise - latent, for the Fisher weights


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
        """Return what is lost with the mask, by head [B, H]: fp64, on the CPU."""
        if self.effect is None:
            return (1 - mask.captured(self.mass)).double().cpu()
        out = self.attention.attend(self.q, self.k, self.v, mask)
        change = (out - self.out).float()
        return self.effect(self, change).double().cpu()


def visit_layers(
    teacher: nn.Module,
    sparse: list[SparseAttention],
    samples: list[Sample],
    visit: Callable[[Sample, Layer], None],
    *,
    measure: Measure | None,
    probes: int,
    seed: int,
    title: str,
) -> list[Tensor]:
    """Call `visit` for each sample and layer of a densely attached teacher; return velocities.

    `sparse` is the attention of each layer that is measured in place of the dense one.

    What needs neither gradients nor more forward passes is visited during the forward pass, so that
    no more than one layer's tensors are held at a time.
    """
    waits = measure in ("fisher", "velocity", "velocity_exact")
    generator = torch.Generator(samples[0].x.device).manual_seed(seed)
    modules = {module: i for i, module in enumerate(attentions(teacher).values())}
    velocities = []
    for sample in tqdm(samples, desc=title, unit="batch"):
        captured: dict[nn.Module, tuple[Any, ...]] = {}

        def keep(
            module: nn.Module,
            args: tuple[Any, ...],
            out: Tensor,
            captured: dict[nn.Module, tuple[Any, ...]] = captured,
            sample: Sample = sample,
        ) -> None:
            if waits:
                captured[module] = (*args, out)
            else:
                layer = _layer(modules[module], sparse, (*args, out))
                layer.effect = _effect_now(measure, teacher, layer.index)
                visit(sample, layer)

        with_graph = measure in ("fisher", "velocity")
        with _hooked(modules, keep), torch.set_grad_enabled(with_graph):
            # x is the root that gives every layer a graph
            root = sample.x.detach().requires_grad_(with_graph)
            v = velocity(teacher, root, sample.t, sample.text, sample.condition)
        outs = [call[-1] for call in captured.values()]
        if with_graph:
            gradients = list(_gradients(measure, v, sample, outs, probes, generator))
        for module, call in captured.items():
            layer = _layer(modules[module], sparse, call)
            if with_graph:
                order = layer.scores.q_layout
                own = [order.permute(g[layer.index]).float() for g in gradients]
                layer.effect = _Projected(measure == "velocity", own)
            else:
                layer.effect = _Replaced(teacher, module, sample, v)
            visit(sample, layer)
        velocities.append(v.detach().cpu())
    return velocities


@contextmanager
def _hooked(modules: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(index: int, sparse: list[SparseAttention], call: tuple[Any, ...]) -> Layer:
    attention = sparse[index]
    query, key, value, grid, _, out = call
    with torch.no_grad(), no_autocast(query):
        q, k, v = (x.detach() for x in (query, key, value))
        q_layout, kv_layout = attention.layout(q, k, v, grid)
        q, k, v = permute_qkv(q_layout, kv_layout, q, k, v)
        scores = attention.estimator(q, k, v, q_layout, kv_layout)
        return Layer(index, attention, q, k, v, q_layout.permute(out.detach()), scores)


def _gradients(
    measure: Measure | None,
    v: Tensor,
    sample: Sample,
    outs: list[Tensor],
    probes: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the gradients by every layer's output: of each probe, or of the flow-matching loss."""
    if measure == "fisher":
        assert sample.target is not None
        loss = (v - sample.target).square().flatten(1).mean(1).sum()  # one loss a clip
        yield torch.autograd.grad(loss, outs)
        return
    norm = v.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    for probe in range(probes):
        u = torch.empty_like(v).normal_(generator=generator) / norm
        keep_graph = probe + 1 < probes
        yield torch.autograd.grad((u * v).sum(), outs, retain_graph=keep_graph)


@dataclass(frozen=True)
class _Projected:
    """The change along gradients: squared as a whole (probes) or by element (diagonal Fisher)."""

    as_a_whole: bool
    gradients: list[Tensor]  # in block order

    def __call__(self, layer: Layer, change: Tensor) -> Tensor:
        products = [gradient * change for gradient in self.gradients]
        if self.as_a_whole:
            return torch.stack([x.sum((2, 3)).square() for x in products]).mean(0)
        return torch.stack([x.square().sum((2, 3)) for x in products]).mean(0)


@dataclass(frozen=True)
class _Replaced:
    """The change of the velocity when one head's output is replaced: a forward pass a head."""

    teacher: nn.Module
    module: nn.Module
    sample: Sample
    velocity: Tensor

    @torch.no_grad()
    def __call__(self, layer: Layer, change: Tensor) -> Tensor:
        change = layer.scores.q_layout.unpermute(change)
        norm = self.velocity.flatten(1).norm(dim=1)
        errors = []
        for head in range(change.shape[1]):

            def replace(module: nn.Module, args: Any, out: Tensor, head: int = head) -> Tensor:
                out = out.clone()
                out[:, head] += change[:, head].to(out.dtype)
                return out

            with _hooked([self.module], replace):
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
