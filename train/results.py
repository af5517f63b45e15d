"""The last stages: export (and reload), report."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer import __version__
from gossamer.sparse.attach import attach
from gossamer.train import checkpoint
from gossamer.train.evaluate import relative_errors, velocities
from gossamer.train.evaluation import method_identity
from gossamer.train.export import (
    ADAPTER_USAGE,
    WHOLE_USAGE,
    export,
    is_export_of,
    model_card,
    refuse_existing,
    write_receipt,
)
from gossamer.train.files import sha256
from gossamer.train.lora import load_adapter, merge
from gossamer.train.pipeline import LatentVideoPipeline, load_pipeline
from gossamer.train.refusal import Refusal
from gossamer.train.samples import noisy_samples

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

EXPORT = "export"
RECEIPT = "export.json"  # beside the export: the checkpoint it was made of, its files' SHA-256


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
    """Export the trained student.

    A sparse one and an adapter, in fp32, only once a fresh copy gives the same velocities bit for
    bit.
    """
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
        "method": method_identity(job),
        "dtype": job.cfg.export.dtype,
        "lora": job.cfg.export.lora,
    }


def _spec(job: "Job") -> dict[str, Any]:
    return {"gossamer_version": __version__, "method": job.method_spec}


def report_stage(job: "Job") -> None:
    """Write the HTML report."""
    from gossamer.train.report import report

    report(job.run_dir)


def _pipeline_parts(job: "Job", student: nn.Module) -> LatentVideoPipeline | Path:
    """Return what stands beside the transformer: the embedded pipeline, or the source folder."""
    return job.source.pipeline or LatentVideoPipeline(
        transformer=student,
        codec=job.codec,
        text=job.text,
        condition=job.source.condition,
        shift=job.shift,
    )


def _card(job: "Job") -> str:
    facts = {
        "recipe": job.cfg.recipe_name,
        "model": job.source.path or "trained from scratch",
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
