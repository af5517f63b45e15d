"""The processors and hooks that carry gossamer's attention in a diffusers transformer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.kept import Pending
from gossamer.sparse.models.context import AttentionContext
from gossamer.sparse.trajectory import Trajectory

RECORD = "_gossamer_attachment"  # a model's attribute


@dataclass
class Attachment:
    """What `attach` put into one transformer; `detach` undoes it."""

    context: AttentionContext
    originals: dict[str, Any]
    hooks: list[RemovableHandle]
    attentions: dict[str, nn.Module]
    dense_steps: int = 0
    dense_layers: int = 0
    trajectory: Trajectory = field(default_factory=Trajectory)

    @property
    def needs_step(self) -> bool:
        """Return whether anything depends on the step that a forward is."""
        own = self.attentions.values()
        return self.dense_steps > 0 or any(getattr(a, "codebooks", None) for a in own)


def install(model: nn.Module, family: ModuleType, make: Callable[[int, int], nn.Module]) -> None:
    """Give each self-attention of a model the module that `make(heads, head_dim)` returns.

    A family may have a processor of its own for attention to the text, which stays what it is.
    """
    layers = dict(family.self_attentions(model))
    made = {
        name: make(layer.heads, layer.inner_dim // layer.heads) for name, layer in layers.items()
    }
    for name, layer in layers.items():
        device = next(layer.parameters()).device
        if device.type != "meta":  # where offloading keeps weights, but numbers would be lost
            made[name].to(device)
    originals = {name: layer.processor for name, layer in layers.items()}
    context = AttentionContext()
    for name, layer in layers.items():
        layer.processor = family.Processor(made[name], context)
    if hasattr(family, "text_attentions"):
        for name, layer in family.text_attentions(model):
            originals[name] = layer.processor
            layer.processor = family.TextProcessor(layer.processor)
    hooks = [_fill_before_forward(model, family), model.register_forward_hook(_await_backward)]
    model.__dict__[RECORD] = Attachment(context, originals, hooks, made)
    if hasattr(model, "cache_context"):
        model.__dict__["cache_context"] = MethodType(_denoising_call, model)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = _refuse_saving


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    """Raise in the place of diffusers' save_pretrained, which would lose the method."""
    raise ValueError(
        "save_pretrained: allowed is a model without gossamer's attention, which a saved model "
        "cannot hold; call gossamer.detach first, or export a run with `gossamer export`"
    )


@contextmanager
def _denoising_call(model: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """Do what diffusers' cache_context does, and note the guidance branch of the call.

    Pipelines name their calls so ("cond", "uncond"), and some say which step it is and its noise
    level. Clusters are carried from step to step of a branch, and forgotten at its first.
    """
    record: Attachment = model.__dict__[RECORD]
    context = record.context
    context.branch, context.step_index = name, kwargs.get("step_index")
    context.sigma = kwargs.get("sigma")
    try:
        with type(model).cache_context(model, name, **kwargs):  # type: ignore[attr-defined]
            yield
    finally:
        context.branch = context.step_index = context.sigma = None


def _fill_before_forward(model: nn.Module, family: ModuleType) -> RemovableHandle:
    parameters = signature(model.forward)

    def fill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = parameters.bind(*args, **kwargs).arguments
        record: Attachment = module.__dict__[RECORD]  # of the module: a deep copy has its own
        context = record.context
        context.grid = family.token_grid(module, call)
        context.timestep = call["timestep"]
        step, is_first = _place(record, call["timestep"])
        for index, attention in enumerate(record.attentions.values()):
            if isinstance(attention, SparseAttention):
                is_dense = index < record.dense_layers or step < record.dense_steps
                attention.reset(context.branch, is_first=is_first, is_dense=is_dense)

    return model.register_forward_pre_hook(fill, with_kwargs=True)


def _await_backward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Hold the masks of a forward with gradients for its backward."""
    if torch.is_grad_enabled() and output[0].requires_grad:
        _hold_masks(module.__dict__[RECORD], output[0])


@torch.compiler.disable
def _hold_masks(record: Attachment, output: Tensor) -> None:
    own = record.attentions.values()
    output.register_hook(Pending([a for a in own if isinstance(a, SparseAttention)]).restore)


def _place(record: Attachment, timestep: Tensor) -> tuple[int, bool]:
    """Return which step of a run the next forward is, and whether it is the branch's first.

    Where the pipeline does not say the noise level, reading the timestep waits for the GPU.
    """
    context, trajectory = record.context, record.trajectory
    if not record.needs_step or (context.branch is None and not record.dense_steps):
        return 0, False
    if context.branch is None or context.step_index is None:
        return trajectory.by_level(context.branch, float(timestep.max()))
    level = float(timestep.max()) if context.sigma is None else context.sigma
    return trajectory.by_index(context.branch, context.step_index, level)
