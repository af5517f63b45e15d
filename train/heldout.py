"""The models of an evaluation on held-out clips: one in memory at a time, what it does is kept."""

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import hit_rates
from gossamer.train.compiling import compiled
from gossamer.train.config import fingerprint
from gossamer.train.evaluate import (
    attention_seconds,
    flow_losses,
    forward_seconds,
    measure_masks,
    other_backends,
    relative_errors,
    velocities,
)
from gossamer.train.found import Found
from gossamer.train.match_density import match_density
from gossamer.train.run_dir import STARTS
from gossamer.train.samples import (
    Clip,
    decode,
    evenly,
    judge,
    keep_videos,
    noisy_samples,
    sample_latents,
)
from gossamer.train.shared_start import shared_start

if TYPE_CHECKING:
    from gossamer.train.job import Job

# What decides what the teacher makes of the clips, beside its weights.
DECIDING = (
    *("model", "data", "codec", "text", "noise", "guidance", "compile", "compile_tuned"),
    *("evaluation.clips", "evaluation.noise_levels", "evaluation.batch_size"),
    *("evaluation.sample_clips", "evaluation.sample_steps"),
)
# And what decides what its untrained sparse copy does, beside its method.
STARTING = (*DECIDING, "sparsity", "error_budget", "evaluation.match_density")
SAMPLES = "samples"


class Heldout:
    """The clips of an evaluation, and the models that meet them: one in memory at a time."""

    def __init__(self, job: "Job", clips: list[Clip]) -> None:
        self.job, self.clips, self.options = job, clips, job.cfg.evaluation
        self.levels = list(self.options.noise_levels)
        self.samples = noisy_samples(clips, self.levels, self.options.batch_size, job.device)
        alike = [clip for clip in clips if clip["latent"].shape == clips[0]["latent"].shape]
        self.sampled = [alike[i] for i in evenly(len(alike), self.options.sample_clips)]

    def teacher(self) -> Found:
        """Return what the teacher makes of the clips; a process that keeps things asks once."""
        job = self.job
        dense = self._loaded(job.dense)
        model = job.guided(dense)
        identity = fingerprint(job.cfg, DECIDING), job.weights_key
        target = job.once(
            ("velocities", *identity), lambda: velocities(model, self.samples, "teacher")
        )
        latents = job.once(("teacher", *identity), lambda: self._sample("teacher", model))
        return Found(target, latents, self._seconds(dense), *self._floor(model, target))

    def dense(self, name: str, make: Callable[[], nn.Module], *, is_reference: bool) -> Found:
        """Return what a dense model makes of the clips, and of as many training clips.

        How far it is from itself is measured where nothing else is the reference.
        """
        model = self._loaded(make)
        if not self.job.trains:
            model = self.job.guided(model)
        found = velocities(model, self.samples, "heldout")
        latents, seconds = self._sample(name, model), self._seconds(model)
        floor = self._floor(model, found) if is_reference else ({}, None)
        return Found(found, latents, seconds, *floor, self._train_losses(model))

    def sparse(self, name: str, make: Callable[[], nn.Module]) -> Found:
        """Return what a sparse model makes of the clips, and its masks."""
        model = self._matched(make)
        masks = measure_masks(model, self.samples)
        latents = self._sample(name, model)
        stayed, seconds = hit_rates(model), self._seconds(model)
        return Found(masks.velocities, latents, seconds, masks=masks, hit_rate=stayed)

    def start(self, method: list[str], make: Callable[[], nn.Module]) -> Found:
        """Return what the untrained sparse model makes of the clips.

        Jobs of a sweep whose `method` is the same, as it is for all seeds, measure it once.
        """

        def measure() -> Found:
            return self.sparse("before", make)

        file = self._shared(method)
        return measure() if file is None else shared_start(file, measure)

    def _shared(self, method: list[str]) -> Path | None:
        job = self.job
        if job.kept is None or not job.trains:  # whose times are a result, and are its own
            return None
        parts: list[Any] = [fingerprint(job.cfg, STARTING), job.weights_key, *method]
        parts += [job.device.type, job.accelerator.mixed_precision]
        parts.append(job.dataset("heldout").manifest.request)  # a folder may be encoded anew
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return job.run_dir.parent / STARTS / f"{name}.safetensors"

    def repeated(self, seed: int, make: Callable[[], nn.Module]) -> list[Tensor]:
        """Return the velocities of the sparse model of another seed."""
        return velocities(self._matched(make), self.samples, f"after, seed {seed}")

    def errors(self, found: list[Tensor], target: list[Tensor]) -> list[list[float]]:
        return relative_errors(found, target, self.samples, len(self.levels))

    def losses(self, found: list[Tensor]) -> list[list[float]]:
        return flow_losses(found, self.samples, len(self.levels))

    def compared(self, latents: dict[str, Tensor | None]) -> dict[str, Any]:
        """Return how like each other, the teacher's and the real clips are; keep some videos."""
        if not self.sampled:
            return {"quality": {}, "files": []}
        known = {"real": torch.stack([c["latent"] for c in self.sampled])}
        if "condition" in self.sampled[0]:
            known["repeat"] = torch.stack([c["condition"] for c in self.sampled])
        given = {name: x for name, x in latents.items() if x is not None}
        videos = decode(known | given, self.job.codec, self.job.device)
        folder = self.job.run_dir / "evaluation" / SAMPLES
        kept = keep_videos(videos, folder, self.options.kept_videos)
        videos["first"] = videos["real"][:, :1].expand_as(videos["real"])
        return {
            "quality": judge(videos, list(self.options.extra)),
            "files": [f"{SAMPLES}/{file.name}" for file in kept],
        }

    def _loaded(self, make: Callable[[], nn.Module]) -> nn.Module:
        gc.collect()  # the model before: its hooks are cycles
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        return compiled(make().requires_grad_(False).eval(), self.job.cfg)

    def _matched(self, make: Callable[[], nn.Module]) -> nn.Module:
        model = self._loaded(make)
        if self.options.match_density:
            match_density(model, self.samples, 1 - self.job.cfg.sparsity)
        return model

    def _train_losses(self, model: nn.Module) -> list[list[float]]:
        dataset = self.job.dataset("train")
        seen = [dataset[i] for i in evenly(len(dataset), len(self.clips))]
        samples = noisy_samples(seen, self.levels, self.options.batch_size, self.job.device)
        return flow_losses(velocities(model, samples, "train"), samples, len(self.levels))

    def _sample(self, name: str, model: nn.Module, *, other_noise: bool = False) -> Tensor | None:
        if not self.sampled:
            return None
        return sample_latents(
            model,
            self.sampled,
            name=name,
            batch_size=self.options.batch_size,
            steps=self.options.sample_steps,
            shift=self.job.shift,
            device=self.job.device,
            other_noise=other_noise,
        )

    def _floor(
        self, model: nn.Module, target: list[Tensor]
    ) -> tuple[dict[str, Any], Tensor | None]:
        if self.job.is_sparse or not self.options.floor:
            return {}, None
        with torch.compiler.set_stance("force_eager"):  # compiled code has chosen its backend
            found = other_backends(model, self.samples)
        errors = {name: self.errors(own, target) for name, own in found.items()}
        return errors, self._sample("other_noise", model, other_noise=True)

    def _seconds(self, model: nn.Module) -> dict[str, float]:
        sample = self.samples[0]
        return {"": forward_seconds(model, sample), "_attention": attention_seconds(model, sample)}
