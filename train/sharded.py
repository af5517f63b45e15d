"""Tensors that are shared out among processes (DTensor) as whole ones, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

Groups = dict[str, dict[str, Tensor]]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from its shares; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(groups: Mapping[str, Mapping[str, Tensor]], *, keep: bool) -> Groups:
    """Return groups of tensors with the shared-out ones whole, on the CPU.

    All processes call it; it is empty where `keep` is False.
    """
    found: Groups = {group: {} for group in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            together = whole(tensor.detach())
            if keep:
                found[group][name] = together.cpu()
    return found


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a whole tensor on the device of `like`: this process's share, if so shaped.

    Nothing is sent: every process has the whole tensor.
    """
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        local = tensor.to(like.to_local().device)
        return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device, copy=True)


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW on this process's shares: each element's update needs no other one.

    torch's own takes no group of shared-out and whole parameters where it is fused.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # fills the lists
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, shared out alike or not; all processes call it."""
    kinds = [
        [g for g in gradients if isinstance(g, DTensor) is is_shared] for is_shared in (False, True)
    ]
    norms = [_norm_of_kind(kind) for kind in kinds if kind]
    return torch.stack(norms).norm()


def _norm_of_kind(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(list(map(local, gradients)))
    first = gradients[0]
    if not isinstance(first, DTensor):
        return norm
    sums = [Partial() if p.is_shard() else p for p in first.placements]
    return whole(DTensor.from_local(norm.square(), first.device_mesh, sums)).sqrt()
