"""The stage after training: student, or dense model, against the teacher and the real clips."""

import json
import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gossamer.sparse.attach import hit_rates
from gossamer.train import checkpoint
from gossamer.train.calibration import CALIBRATION
from gossamer.train.compiling import compiled, compiling
from gossamer.train.config import data_dir, fingerprint
from gossamer.train.data.shards import MANIFEST
from gossamer.train.evaluate import (
    Clip,
    MaskReport,
    attention_seconds,
    decode,
    evenly,
    flow_losses,
    forward_seconds,
    judge,
    keep_videos,
    measure_masks,
    noisy_samples,
    other_backends,
    relative_errors,
    sample_latents,
    velocities,
)
from gossamer.train.files import sha256, write_atomic
from gossamer.train.match_density import match_density
from gossamer.train.reporting.maps import write_masks

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

METHOD = ("layout", "estimator", "policy", "compensation", "backend", "noise", "guidance", "lora")
FIXED = ("model", "data", "codec", "text", "noise", "guidance", "evaluation")  # of the teacher
EVALUATION = "evaluation/evaluation.json"
SAMPLES = "samples"
MASKS = "evaluation/masks.npz"


def evaluate_stage(job: "Job") -> None:
    """Measure on held-out clips and write evaluation/evaluation.json with the samples.

    A run that does not train is measured at its start.
    """
    with compiling(job):
        _evaluate(job)


def _evaluate(job: "Job") -> None:
    path = job.run_dir / EVALUATION
    start = time.monotonic()
    made_for = _made_for(job)
    if path.is_file() and json.loads(path.read_text()).get("made_for") == made_for:
        job.log("%s is already of these checkpoints: nothing to do", path)
        return
    dataset = job.dataset("heldout")
    options = job.cfg.evaluation
    chosen = evenly(len(dataset), options.clips)
    clips = [dataset[i] for i in chosen]
    with job.autocast():
        result = (_sparse if job.is_sparse else _dense)(_Heldout(job, clips))
    result |= {
        "noise_levels": list(options.noise_levels),
        "clips": [_clip(c["index"], dataset.meta(c["index"])) for c in clips],
        "device": device_name(job.device),
        "seconds": time.monotonic() - start,
        "made_for": made_for,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result))


def _clip(index: int, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what a clip is called and its shot: two clips of one shot are not independent."""
    shot = f"{meta['source']}:{meta['shot_start']}"
    return {"index": index, "clip_id": meta["clip_id"], "shot": shot}


def method_identity(job: "Job") -> list[str]:
    """Return what identifies a run's masks and noise: hashes of its config and its budgets."""
    budgets = job.calibration_dir / CALIBRATION
    hashes = [sha256(budgets)] if job.is_sparse and budgets.is_file() else []
    return [fingerprint(job.cfg, METHOD), *hashes]


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _made_for(job: "Job") -> dict[str, Any]:
    """Return what identifies an evaluation: checkpoints, masks, data, settings and device."""
    trained = job.seeds if job.trains else []
    files = {str(s): job.newest_checkpoint(s) / checkpoint.MANIFEST for s in trained}
    files["data"] = data_dir(job.cfg) / MANIFEST
    return {
        "files": {name: sha256(file) for name, file in files.items()},
        "method": method_identity(job),
        "settings": OmegaConf.to_container(job.cfg.evaluation),
        "device": device_name(job.device),
    }


class _Heldout:
    """The clips of an evaluation, and what the teacher makes of them."""

    def __init__(self, job: "Job", clips: list[Clip]) -> None:
        self.job, self.clips, self.options = job, clips, job.cfg.evaluation
        self.levels = list(self.options.noise_levels)
        self.samples = noisy_samples(clips, self.levels, self.options.batch_size, job.device)
        alike = [clip for clip in clips if clip["latent"].shape == clips[0]["latent"].shape]
        self.sampled = [alike[i] for i in evenly(len(alike), self.options.sample_clips)]
        self.dense = compiled(job.dense(), job.cfg)
        self.teacher = job.guided(self.dense)
        self.identity = fingerprint(job.cfg, FIXED), job.part_of_key(self.dense)

    def target(self) -> list[Tensor]:
        """Return the teacher's velocities, computed once in a process that keeps them."""
        return self.job.once(
            ("velocities", *self.identity),
            lambda: velocities(self.teacher, self.samples, "teacher"),
        )

    def errors(self, found: list[Tensor]) -> list[list[float]]:
        return relative_errors(found, self.target(), self.samples, len(self.levels))

    def losses(self, found: list[Tensor]) -> list[list[float]]:
        return flow_losses(found, self.samples, len(self.levels))

    def latents(self, name: str, model: nn.Module, *, other_noise: bool = False) -> Tensor:
        """Return the model's samples of the sampled clips; the teacher's are kept."""

        def make() -> Tensor:
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

        is_teacher = model is self.teacher
        return self.job.once((name, *self.identity), make) if is_teacher else make()

    def compared(self, latents: dict[str, Tensor]) -> dict[str, Any]:
        """Return how like each other, the teacher's and the real clips are; keep some videos."""
        if not self.sampled:
            return {"quality": {}, "files": []}
        known = {"real": torch.stack([c["latent"] for c in self.sampled])}
        if "condition" in self.sampled[0]:
            known["repeat"] = torch.stack([c["condition"] for c in self.sampled])
        videos = decode(known | latents, self.job.codec, self.job.device)
        folder = self.job.run_dir / EVALUATION
        kept = keep_videos(videos, folder.parent / SAMPLES, self.options.kept_videos)
        videos["first"] = videos["real"][:, :1].expand_as(videos["real"])
        return {
            "quality": judge(videos, list(self.options.extra)),
            "files": [f"{SAMPLES}/{file.name}" for file in kept],
        }

    def seconds(self, **models: nn.Module) -> dict[str, float]:
        """Return the seconds of each model's forward, and of all its attention layers."""
        sample = self.samples[0]
        whole = {name: forward_seconds(model, sample) for name, model in models.items()}
        return whole | {
            f"{name}_attention": attention_seconds(model, sample) for name, model in models.items()
        }

    def floor(self) -> dict[str, Any]:
        """Return how far the teacher is from itself with other attention backends."""
        with_backends = other_backends(self.teacher, self.samples)
        return {"backends": {name: self.errors(found) for name, found in with_backends.items()}}


def _sparse(heldout: _Heldout) -> dict[str, Any]:
    job = heldout.job
    before = compiled(job.student(job.cfg.seed).requires_grad_(False).eval(), job.cfg)
    after = {s: compiled(job.trained(s), job.cfg) for s in job.seeds} if job.trains else {}
    own = after.get(job.cfg.seed, before)
    if heldout.options.match_density:
        for model in (before, *after.values()):
            match_density(model, heldout.samples, 1 - job.cfg.sparsity)
    masks: dict[str, MaskReport] = {"before": measure_masks(before, heldout.samples)}
    masks["after"] = measure_masks(own, heldout.samples) if after else masks["before"]
    started = masks["before"].velocities
    found = {job.cfg.seed: masks["after"].velocities} | {
        seed: velocities(model, heldout.samples, f"after, seed {seed}")
        for seed, model in after.items()
        if seed != job.cfg.seed
    }
    write_masks(job.run_dir / MASKS, {when: report.selected for when, report in masks.items()})
    latents = {}
    if heldout.sampled:
        latents["teacher"] = heldout.latents("teacher", heldout.teacher)
        latents["before"] = heldout.latents("before", before)
        latents["after"] = heldout.latents("after", own) if after else latents["before"]
    stayed = {when: hit_rates(model) for when, model in (("before", before), ("after", own))}
    samples = heldout.compared(latents)
    quality = samples["quality"]
    return {
        "trained": job.trains,
        "seeds": job.seeds,
        "sparsity": {
            "requested": job.cfg.sparsity,  # null where an error budget was given
            "planned": 1 - job.calibration.planned_density,
            "measured_before": 1 - masks["before"].mean_density,
            "measured_after": 1 - masks["after"].mean_density,
        },
        "velocity_error": {
            "before": heldout.errors(started),
            "after": {str(s): heldout.errors(found.get(s, started)) for s in job.seeds},
        },
        "heldout_loss": {
            "teacher": heldout.losses(heldout.target()),
            "before": heldout.losses(started),
            "after": heldout.losses(found.get(job.cfg.seed, started)),
        },
        "forward_seconds": heldout.seconds(teacher=heldout.dense, student=own),
        "layers": list(masks["after"].density),
        "density": {n: [d.tolist() for d in m.density.values()] for n, m in masks.items()},
        "recall": {n: [r.tolist() for r in m.recall.values()] for n, m in masks.items()},
        "hit_rate": {  # of q and of k clusters along the samples, [layer][2][head]
            n: [rate.tolist() for rate in of_layers.values()] for n, of_layers in stayed.items()
        },
        "samples": samples
        | {
            "psnr_to_teacher": {
                n: quality[f"teacher/{n}"]["psnr"] if quality else [] for n in ("before", "after")
            }
        },
    }


def _dense(heldout: _Heldout) -> dict[str, Any]:
    """Measure a dense model: its loss on both splits, samples, and what moved it if it is tuned."""
    job, levels = heldout.job, heldout.levels
    is_tuned = job.trains and job.is_pretrained
    own = "after" if is_tuned else "teacher"
    model = compiled(job.trained(job.cfg.seed), job.cfg) if job.trains else heldout.teacher
    train = job.dataset("train")
    seen = [train[i] for i in evenly(len(train), len(heldout.clips))]
    of_train = noisy_samples(seen, levels, heldout.options.batch_size, job.device)
    found = velocities(model, heldout.samples, "heldout")
    losses = {
        "train": _by_level(
            flow_losses(velocities(model, of_train, "train"), of_train, len(levels))
        ),
        "heldout": _by_level(heldout.losses(found)),
    }
    latents = {}
    if heldout.sampled:
        latents[own] = heldout.latents(own, model)
        if is_tuned:
            latents["teacher"] = heldout.latents("teacher", heldout.teacher)
        if heldout.options.floor:
            latents["other_noise"] = heldout.latents(
                "other_noise", heldout.teacher, other_noise=True
            )
    samples = heldout.compared(latents)
    quality = samples["quality"]
    result: dict[str, Any] = {
        "trained": job.trains,
        "flow_matching_loss": losses,
        "heldout_loss": {"after": heldout.losses(found)},
        "forward_seconds": heldout.seconds(student=model),
        "samples": samples
        | {
            "psnr_to_real": quality[f"real/{own}"]["psnr"] if quality else [],
            "repeat_first_psnr": quality["real/repeat"]["psnr"] if "real/repeat" in quality else [],
        },
    }
    if is_tuned:
        result["velocity_error"] = {"after": {str(job.cfg.seed): heldout.errors(found)}}
    if heldout.options.floor:
        result["floor"] = heldout.floor()
    return result


def _by_level(losses: list[list[float]]) -> list[float]:
    return [sum(level) / len(level) for level in zip(*losses, strict=True)]
