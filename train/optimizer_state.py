"""The state of an optimizer as tensors and JSON, which a checkpoint holds, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.train.refusal import Refusal
from gossamer.train.sharded import shared_like
from gossamer.train.tensor_files import Source

NamedParams = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: NamedParams
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten an AdamW-like optimizer: tensors called `<parameter>/<field>`, the rest as JSON."""
    names = {param: name for name, param in dict(named_params).items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        owned = [names[param] for param in group["params"]]
        groups.append({"params": owned})
        for name, param in zip(owned, group["params"], strict=True):
            for field, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{field}"] = value
                else:
                    scalars.setdefault(name, {})[field] = value
    kind = type(optimizer).__name__
    return tensors, {"kind": kind, "groups": groups, "scalars": scalars}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    named_params: NamedParams,
    tensors: Mapping[str, Source],
    state: Mapping[str, Any],
) -> None:
    """Restore bit for bit what `optimizer_tensors` gave; Refusal if parameters or optimizer differ.

    Unlike Optimizer.load_state_dict it keeps each tensor's dtype, and the settings of the groups as
    they are: the config decides them, also a forced other one.
    """
    kind, saved_kind = type(optimizer).__name__, state.get("kind", "AdamW")
    if kind != saved_kind:
        raise Refusal("optimizer", kind, f"{saved_kind}, of the checkpoint", "set the same one")
    params = dict(named_params)
    names = {param: name for name, param in params.items()}
    groups = optimizer.param_groups
    current = {(i, names[p]) for i, group in enumerate(groups) for p in group["params"]}
    saved = {(i, name) for i, group in enumerate(state["groups"]) for name in group["params"]}
    if current != saved:
        differing = ", ".join(name for _, name in sorted(current ^ saved)[:5])
        allowed = "the parameters and groups the checkpoint was trained with"
        raise Refusal("optimizer", differing, allowed, "resume with the run's own configuration")
    on_device = {
        names[param]
        for group in groups
        if group.get("capturable") or group.get("fused")
        for param in group["params"]
    }
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        # torch counts steps on the host unless the update itself runs without it.
        on_host = field == "step" and name not in on_device
        own = tensor[...].clone() if on_host else shared_like(tensor, params[name])
        optimizer.state[params[name]][field] = own
    for name, fields in state["scalars"].items():
        optimizer.state[params[name]].update(fields)
