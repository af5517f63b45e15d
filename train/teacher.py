"""The ways to hold a dense teacher during training (one YAML each in conf/teacher/)."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from gossamer.sparse.attach import attending_densely
from gossamer.train.compiling import compiled
from gossamer.train.draws import Noised
from gossamer.train.lora import adapters_off
from gossamer.train.model import velocity
from gossamer.train.processes import accepted, on_main
from gossamer.train.velocities import VelocityCache, cache_dir

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)


class Teacher(Protocol):
    """Gives the dense velocity of a batch; `start` is called once, before any student is made."""

    def start(self, job: "Job") -> None:
        """Get hold of the teacher; all processes call it. Raises Refusal where that cannot be."""

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        """Return the velocity [B, C, f, h, w], fp32. Called without gradients."""


class Frozen:
    """A second copy of the dense weights on the device, or shared out as the student's are."""

    model: nn.Module

    def start(self, job: "Job") -> None:
        model = compiled(job.dense_on_cpu(), job.cfg)
        self.model = job.guided(job.parallel.place(model))

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        return velocity(self.model, noised.x, noised.t, noised.text, noised.condition)


class Offloaded(Frozen):
    """A second copy that stays in CPU memory; each block visits the GPU when its turn comes.

    diffusers' group offloading: on a GPU the next block is copied while this one computes. `pin`
    keeps the whole copy in page-locked memory, in every process: faster, and not swappable. Never
    compiled: the hooks that move the blocks would be inside the compiled code.
    """

    def __init__(self, *, pin: bool = True) -> None:
        self.pin = pin

    def start(self, job: "Job") -> None:
        model = job.dense_on_cpu()
        job.parallel.share_tokens(model)
        on_gpu = job.device.type == "cuda"
        model.enable_group_offload(
            onload_device=job.device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=on_gpu,
            record_stream=on_gpu,
            low_cpu_mem_usage=not self.pin,
        )
        self.model = job.guided(model)


class Shared:
    """The student's own base weights: adapters off, dense attention. Needs no second copy."""

    job: "Job"

    def start(self, job: "Job") -> None:
        self.job = job

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(adapters_off(student))
            stack.enter_context(attending_densely(student))
            model = self.job.guided(student)
            return velocity(model, noised.x, noised.t, noised.text, noised.condition)


class Cached:
    """Velocities that `gossamer encode teacher=cached` wrote; no teacher is in memory.

    At the start a live teacher repeats `check` of them, spread over the cache.
    """

    cache: VelocityCache

    def __init__(self, *, path: str | None = None, check: int = 4) -> None:
        self.path, self.check = path, check

    def folder(self, cfg: Any) -> Path:
        """Return where the velocities lie: `path`, or a folder of the data named by the config."""
        return cache_dir(cfg) if self.path is None else Path(self.path)

    def start(self, job: "Job") -> None:
        folder = self.folder(job.cfg)

        def verify() -> None:
            cache = VelocityCache.open(folder)
            cache.verify(job, samples=self.check)

        def take() -> None:
            self.cache = VelocityCache.open(folder)

        on_main(verify, job.accelerator)
        accepted(take, job.together)

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        return self.cache.read(noised.index, noised.draw).to(noised.x.device)


class Guided(nn.Module):
    """A transformer that gives v_n + scale (v - v_n), v_n being its velocity for `negative`.

    Classifier-free guidance (arXiv 2207.12598) in one call with the transformer's own signature.
    """

    def __init__(self, model: nn.Module, negative: Tensor, scale: float) -> None:
        super().__init__()
        self.model, self.negative, self.scale = model, negative, scale
        self.patch_embedding = model.patch_embedding  # whose dtype `velocity` reads
        self.cache_context = model.cache_context  # which the sampler enters

    def forward(self, *, encoder_hidden_states: Tensor, **call: Any) -> tuple[Tensor]:
        """Return the guided velocity as a tuple of one, fp32."""
        negative = self.negative.to(encoder_hidden_states).expand_as(encoder_hidden_states)
        own = self.model(encoder_hidden_states=encoder_hidden_states, **call)[0].float()
        other = self.model(encoder_hidden_states=negative, **call)[0].float()
        return (other + self.scale * (own - other),)
