"""The stages after training: evaluate, export (and reload), report."""

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import nn

from gossamer import __version__
from gossamer.sparse.attach import attach
from gossamer.train import checkpoint
from gossamer.train.calibration import CALIBRATION
from gossamer.train.config import data_dir, fingerprint
from gossamer.train.data.shards import MANIFEST
from gossamer.train.evaluate import (
    Clip,
    evenly,
    measure_masks,
    noisy_samples,
    relative_errors,
    sample_videos,
    velocities,
)
from gossamer.train.export import (
    ADAPTER_USAGE,
    WHOLE_USAGE,
    export,
    is_export_of,
    model_card,
    refuse_existing,
    write_receipt,
)
from gossamer.train.files import sha256, write_atomic
from gossamer.train.lora import load_adapter, merge
from gossamer.train.pipeline import LatentVideoPipeline, load_pipeline
from gossamer.train.refusal import Refusal

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

MASKS = ("layout", "estimator", "policy", "compensation", "backend")
METHOD = (*MASKS, "noise", "guidance", "lora")
EVALUATION = "evaluation/evaluation.json"
EXPORT = "export"
RECEIPT = "export.json"  # beside the export: the checkpoint it was made of, its files' SHA-256


def evaluate_stage(job: "Job") -> None:
    """Measure on held-out clips and write evaluation/evaluation.json with the samples."""
    path = job.run_dir / EVALUATION
    start = time.monotonic()
    made_for = _evaluated(job)
    if path.is_file() and json.loads(path.read_text()).get("made_for") == made_for:
        job.log("%s is already of these checkpoints: nothing to do", path)
        return
    dataset = job.dataset("heldout")
    options = job.cfg.evaluation
    chosen = evenly(len(dataset), options.clips)
    clips = [dataset[i] for i in chosen]
    with job.autocast():
        result = (_evaluate_sparse if job.is_sparse else _evaluate_dense)(job, clips)
    result |= {
        "noise_levels": list(options.noise_levels),
        "clips": [
            {"index": c["index"], "clip_id": dataset.meta(c["index"])["clip_id"]} for c in clips
        ],
        "device": device_name(job.device),
        "seconds": time.monotonic() - start,
        "made_for": made_for,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result))


def _evaluated(job: "Job") -> dict[str, Any]:
    """Return what identifies an evaluation: checkpoints, masks, data, settings and device."""
    files = {str(s): job.newest_checkpoint(s) / checkpoint.MANIFEST for s in job.seeds}
    files["data"] = data_dir(job.cfg) / MANIFEST
    return {
        "files": {name: sha256(file) for name, file in files.items()},
        "method": _method(job),
        "settings": OmegaConf.to_container(job.cfg.evaluation),
        "device": device_name(job.device),
    }


def _method(job: "Job") -> list[str]:
    """Return what identifies a run's masks and noise: hashes of its config and its budgets."""
    budgets = job.calibration_dir / CALIBRATION
    hashes = [sha256(budgets)] if job.is_sparse and budgets.is_file() else []
    return [fingerprint(job.cfg, METHOD), *hashes]


def _evaluate_sparse(job: "Job", clips: list[Clip]) -> dict[str, Any]:
    options = job.cfg.evaluation
    levels = list(options.noise_levels)
    samples = noisy_samples(clips, levels, options.batch_size, job.device)
    teacher = job.guided(job.dense())
    target = velocities(teacher, samples, "teacher")

    def errors(model: nn.Module, title: str) -> list[list[float]]:
        return relative_errors(velocities(model, samples, title), target, samples, len(levels))

    before = job.student(job.cfg.seed).requires_grad_(False).eval()
    after = {seed: job.trained(seed) for seed in job.seeds}
    masks = {"before": measure_masks(before, samples)}
    masks["after"] = measure_masks(after[job.cfg.seed], samples)
    models = {"teacher": teacher, "before": before, "after": after[job.cfg.seed]}
    few = _few(clips, options.sample_clips)
    psnr = _samples(job, models, few)
    return {
        "seeds": job.seeds,
        "sparsity": {
            "requested": job.cfg.sparsity,  # null where an error budget was given
            "planned": 1 - job.calibration.planned_density,
            "measured_before": 1 - masks["before"].mean_density,
            "measured_after": 1 - masks["after"].mean_density,
        },
        "velocity_error": {
            "before": errors(before, "before"),
            "after": {str(s): errors(m, f"after, seed {s}") for s, m in after.items()},
        },
        "layers": list(masks["after"].density),
        "density": {n: [d.tolist() for d in m.density.values()] for n, m in masks.items()},
        "recall": {n: [r.tolist() for r in m.recall.values()] for n, m in masks.items()},
        "samples": {
            "psnr_to_teacher": {n: psnr[f"teacher/{n}"] for n in ("before", "after")},
            "files": [f"samples/clip-{i}.npz" for i in range(len(few))],
        },
    }


def _evaluate_dense(job: "Job", clips: list[Clip]) -> dict[str, Any]:
    """Measure a dense model: flow-matching loss on both splits, and samples against real clips."""
    options = job.cfg.evaluation
    levels = list(options.noise_levels)
    model = job.trained(job.cfg.seed)
    train = job.dataset("train")
    losses = {}
    for split, some in (
        ("train", [train[i] for i in evenly(len(train), len(clips))]),
        ("heldout", clips),
    ):
        samples = noisy_samples(some, levels, options.batch_size, job.device)
        by_level: list[list[float]] = [[] for _ in levels]
        for sample, v in zip(samples, velocities(model, samples, split), strict=True):
            assert sample.target is not None
            error = (v - sample.target.cpu()).square().flatten(1).mean(1)
            by_level[sample.level] += error.tolist()
        losses[split] = [sum(row) / len(row) for row in by_level]
    few = _few(clips, options.sample_clips)
    psnr = _samples(job, {"teacher": model}, few)
    return {
        "flow_matching_loss": losses,
        "samples": {
            "psnr_to_real": psnr["real/teacher"],
            "repeat_first_psnr": psnr.get("real/repeat", []),
            "files": [f"samples/clip-{i}.npz" for i in range(len(few))],
        },
    }


def _few(clips: list[Clip], count: int) -> list[Clip]:
    """Return some clips to sample, of the first one's size."""
    alike = [clip for clip in clips if clip["latent"].shape == clips[0]["latent"].shape]
    return [alike[i] for i in evenly(len(alike), count)]


def _samples(job: "Job", models: dict[str, nn.Module], clips: list[Clip]) -> dict[str, list[float]]:
    return sample_videos(
        models,
        clips,
        job.codec,
        job.run_dir / "evaluation" / "samples",
        steps=job.cfg.evaluation.sample_steps,
        shift=job.shift,
        device=job.device,
    )


def check_export(job: "Job") -> None:
    """Refuse, before any work, an export of another checkpoint that the stages would replace."""
    folder = job.run_dir / EXPORT
    if "export" not in job.stages or not folder.exists() or job.cfg.export.overwrite:
        return
    newest = checkpoint.latest(job.seed_dir(job.cfg.seed) / "checkpoints")
    unfinished = newest is None or checkpoint.step_of(newest) < job.cfg.steps
    if ("train" in job.stages and unfinished) or not _is_exported(job):
        raise refuse_existing(folder)


def export_stage(job: "Job") -> None:
    """Export the trained student once a fresh copy of it gives the same velocities bit for bit."""
    folder = job.run_dir / EXPORT
    if folder.exists() and _is_exported(job):
        job.log("%s is already the export of the newest checkpoint: nothing to do", folder)
        return
    student = job.trained(job.cfg.seed)
    dataset = job.dataset("train")
    levels = list(job.cfg.evaluation.noise_levels)[:1]
    samples = noisy_samples([dataset[0]], levels, 1, job.device)
    as_adapter = job.cfg.export.lora == "adapter"
    if job.cfg.lora.rank and not as_adapter:
        trained = velocities(student, samples, "before merging")
        merge(student)
        merged = velocities(student, samples, "merged")
        error = relative_errors(merged, trained, samples, 1)[0][0]
        job.log("merging the adapter moved the velocity by %.2g of its norm", error)
    expected = velocities(student, samples, "before export")[0]

    def check(partial: Path) -> None:
        if (job.is_sparse or as_adapter) and job.cfg.export.dtype == "float32":
            reloaded = _with_adapter(job, partial) if as_adapter else _whole(partial)
            reloaded.to(job.device)
            if not torch.equal(velocities(reloaded, samples, "reloaded export")[0], expected):
                raise Refusal(
                    "export", partial, "an export that repeats the student's bits", "report this"
                )
            job.log("the reloaded export's velocities equal the trained student's bit for bit")
        write_receipt(job.run_dir / RECEIPT, partial, _exported(job))

    export(
        student,
        folder,
        spec=_spec(job) if job.is_sparse else None,
        pipeline=None if as_adapter else _pipeline_parts(job, student),
        card=_card(job),
        overwrite=job.cfg.export.overwrite,
        dtype=getattr(torch, job.cfg.export.dtype),
        before_publish=check,
    )


def _whole(folder: Path) -> nn.Module:
    return load_pipeline(folder).transformer


def _with_adapter(job: "Job", folder: Path) -> nn.Module:
    """Return the run's starting model with an exported adapter and its masks."""
    model = job.source.load(job.cfg.seed).requires_grad_(False).eval()
    attach(model, folder if job.is_sparse else None)
    load_adapter(model, folder)
    return model


def _is_exported(job: "Job") -> bool:
    folder = job.run_dir / EXPORT
    return is_export_of(job.run_dir / RECEIPT, folder, _exported(job))


def _exported(job: "Job") -> dict[str, Any]:
    """Return what identifies an export: the newest checkpoint, and how it is written."""
    newest = job.newest_checkpoint(job.cfg.seed)
    manifest = sha256(newest / checkpoint.MANIFEST)
    return {
        "name": newest.name,
        "manifest": manifest,
        "method": _method(job),
        "dtype": job.cfg.export.dtype,
        "lora": job.cfg.export.lora,
    }


def _spec(job: "Job") -> dict[str, Any]:
    return {"gossamer_version": __version__, "method": job.method_spec}


def report_stage(job: "Job") -> None:
    """Write the HTML report."""
    from gossamer.train.report import report

    report(job.run_dir)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _pipeline_parts(job: "Job", student: nn.Module) -> LatentVideoPipeline | Path | None:
    """Return what stands beside the transformer: the embedded pipeline, or the source folder."""
    source = getattr(job.source, "path", None)
    if source is not None and (source / "transformer").is_dir() and (source / "vae").is_dir():
        return Path(source)
    return LatentVideoPipeline(
        transformer=student,
        codec=job.codec,
        text=job.text,
        condition=job.source.condition,
        shift=job.shift,
    )


def _card(job: "Job") -> str:
    facts = {
        "recipe": job.cfg.recipe_name,
        "model": getattr(job.source, "path", "trained from scratch"),
        "sparsity": job.sparsity,
        "adapter": _adapter(job),
        "guidance": job.cfg.guidance.scale,
        "loss": job.cfg.loss.name if "name" in job.cfg.loss else job.cfg.loss._target_,
        "steps": job.cfg.steps,
        "seed": job.cfg.seed,
        "gossamer": __version__,
    }
    usage = ADAPTER_USAGE if job.cfg.export.lora == "adapter" else WHOLE_USAGE
    return model_card(job.run_dir.name, facts, usage)


def _adapter(job: "Job") -> str:
    if not job.cfg.lora.rank:
        return "none"
    return f"LoRA of rank {job.cfg.lora.rank}, {job.cfg.lora.layers}, {job.cfg.export.lora}"
