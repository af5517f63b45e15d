"""How the processes of a run share its work: copies (DDP), shards (FSDP2, HSDP), tokens (Ulysses).

Sharded are the weights of linear and convolution layers, with their gradients, optimizer state and
averages: 99.9 % of the parameters. Biases, norms, modulation tables and mask parameters stay whole
and in fp32 in every process, and their gradients are averaged before each step.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gossamer.sparse.attach import share_sequence
from gossamer.sparse.sequence import SequenceParallel
from gossamer.train.launch import Launch
from gossamer.train.model import blocks_of
from gossamer.train.processes import Together
from gossamer.train.refusal import Refusal
from gossamer.train.sharded import local, norm_of

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class Parallel:
    """Shares models among the processes of an accelerator; one process shares nothing."""

    def __init__(
        self, accelerator: Accelerator, launch: Launch | None = None, sequence_parallel: int = 1
    ) -> None:
        launch = launch or Launch(accelerator.num_processes)
        check_sequence(sequence_parallel, accelerator.num_processes)
        self.accelerator, self._reshard = accelerator, launch.reshard
        self.mesh = _mesh(launch, accelerator.device.type)
        self.together = Together(accelerator.process_index, accelerator.num_processes, launch.shard)
        self.sequence = _sequence(accelerator, sequence_parallel)

    @property
    def data_rank(self) -> int:
        """Return which share of each batch is this process's."""
        return self.accelerator.process_index // self._per_sample

    @property
    def data_processes(self) -> int:
        """Return into how many shares each batch is split."""
        return self.accelerator.num_processes // self._per_sample

    @property
    def _per_sample(self) -> int:
        return 1 if self.sequence is None else self.sequence.size

    def place(self, model: nn.Module) -> nn.Module:
        """Bring an attached transformer to the device, or this process's shares of it."""
        self.share_tokens(model)
        return model.to(self.accelerator.device) if self.mesh is None else self._shard(model)

    def share_tokens(self, model: nn.Module) -> None:
        """Let an attached transformer work on this process's tokens, wherever its weights are."""
        if self.sequence is not None:
            share_sequence(model, self.sequence)

    def wrap(self, distiller: nn.Module) -> Callable[[Batch], Losses]:
        """Return the distiller's forward: in the run's precision, its gradients synchronised."""
        if self.mesh is None:
            return self.accelerator.prepare(distiller)

        def forward(batch: Batch) -> Losses:
            with self.accelerator.autocast():
                return distiller(batch)

        return forward

    def accumulating(self, wrapped: Any) -> AbstractContextManager[None]:
        """Leave gradients unsynchronised inside; shards take each part at once, to hold no more."""
        return self.accelerator.no_sync(wrapped) if self.mesh is None else nullcontext()

    @torch.no_grad()
    def average_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients that no wrapper has: of what stays whole beside shards."""
        if self.mesh is None:
            return
        found = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if not found:
            return
        mean = self.accelerator.reduce(torch.cat([g.flatten() for g in found]), "mean")
        for gradient, part in zip(found, mean.split([g.numel() for g in found]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients, of all shards where there are some."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients) if self.mesh is None else norm_of(gradients)

    @torch.no_grad()
    def clip(self, parameters: list[nn.Parameter], norm: Tensor, most: float) -> None:
        """Scale the gradients, whose norm this is, down to a norm of at most `most`."""
        factor = most / (norm + 1e-6)
        if factor < 1:  # else a pass over all gradients would change none
            torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)

    def _shard(self, model: nn.Module) -> nn.Module:
        layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv3d))
        shared = {layer.weight for layer in layers}
        whole = {p for p in model.parameters() if p not in shared}
        for parameter in whole:
            parameter.data = parameter.data.to(self.accelerator.device)
        is_bf16 = self.accelerator.mixed_precision == "bf16"
        # Inputs are not cast: a timestep in bf16 is another timestep. Autocast does the rest.
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": self.mesh, "ignored_params": whole}
        for block in blocks_of(model):
            fully_shard(
                block,
                mp_policy=bf16 if is_bf16 else fp32,
                reshard_after_forward=self._reshard,
                **options,
            )
        # The model's output is a view, as FSDP warns, but nothing is ever written into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        fully_shard(model, mp_policy=fp32, **options)
        return model


def check_sequence(sequence_parallel: int, processes: int) -> None:
    """Refuse groups that the processes cannot be split into."""
    if processes % sequence_parallel:
        raise Refusal(
            "sequence_parallel",
            sequence_parallel,
            f"a divisor of the {processes} processes",
            "launch with a multiple of it (--num_processes), or set it to 1",
        )


def _mesh(launch: Launch, device: str) -> DeviceMesh | None:
    if launch.shard == 1:
        return None
    replicas = launch.processes // launch.shard
    if replicas == 1:
        return init_device_mesh(device, (launch.shard,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device, (replicas, launch.shard), mesh_dim_names=names)


def _sequence(accelerator: Accelerator, size: int) -> SequenceParallel | None:
    if size == 1:
        return None
    processes, own = accelerator.num_processes, None
    for first in range(0, processes, size):  # neighbours, whose links are the fastest
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if accelerator.process_index in ranks:
            own = SequenceParallel(group, accelerator.process_index - first, size)
    return own
