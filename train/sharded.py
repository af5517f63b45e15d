"""Tensors that are shared out among processes (DTensor): their shares, and the whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from gossamer.train.tensor_files import Rows, Source


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from its shares; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_parts(tensors: Mapping[str, Tensor], *, others: bool) -> dict[str, Tensor | Rows]:
    """Return this process's rows of shared-out tensors, and the others if they are its to keep."""
    found: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if others:
                found[name] = tensor
        elif (own := tensor.to_local()).numel():
            found[name] = Rows(own, _first_row(tensor), tensor.shape[0])
    return found


def own_rows(source: Source, like: Tensor) -> Tensor:
    """Return what this process has of a tensor that is shared out like another, if so shaped."""
    if isinstance(like, DTensor) and source.shape == like.shape:
        first = _first_row(like)
        return source[first : first + like.to_local().shape[0]]
    return source[...]


def shared_like(source: Source, like: Tensor) -> Tensor:
    """Return a copy of a tensor on the device of `like`: this process's share, if so shaped.

    Nothing is sent: every process can read the whole tensor.
    """
    own = own_rows(source, like).to(local(like).device, copy=True)
    if not (isinstance(like, DTensor) and source.shape == like.shape):
        return own
    return DTensor.from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _first_row(tensor: DTensor) -> int:
    """Return where this process's rows begin: FSDP gives each equally many, the last ones less."""
    (dim,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard(0))
    part = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
    return min(tensor.device_mesh.get_local_rank(dim) * part, tensor.shape[0])


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
