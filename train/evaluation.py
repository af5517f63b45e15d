"""The stage after training: student, or dense model, against the teacher and the real clips."""

import json
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from gossamer.train import checkpoint
from gossamer.train.calibration import CALIBRATION
from gossamer.train.compiling import compiling
from gossamer.train.config import data_dir, fingerprint
from gossamer.train.data.shards import MANIFEST
from gossamer.train.files import sha256, write_atomic
from gossamer.train.found import Found
from gossamer.train.heldout import Heldout
from gossamer.train.reporting.maps import write_masks
from gossamer.train.samples import evenly

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

METHOD = ("layout", "estimator", "policy", "compensation", "backend", "noise", "guidance", "lora")
EVALUATION = "evaluation/evaluation.json"
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
        result = (_sparse if job.is_sparse else _dense)(Heldout(job, clips))
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
    """Return what identifies an evaluation: weights, masks, data, settings, code and device."""
    trained = job.seeds if job.trains else []
    files = {str(s): job.newest_checkpoint(s) / checkpoint.MANIFEST for s in trained}
    files["data"] = data_dir(job.cfg) / MANIFEST
    return {
        "files": {name: sha256(file) for name, file in files.items()},
        "weights": job.weights_stamp,
        "method": method_identity(job),
        "settings": OmegaConf.to_container(job.cfg.evaluation),
        "precision": job.accelerator.mixed_precision,
        "compile": [job.cfg.compile, job.cfg.compile_tuned],
        "device": device_name(job.device),
    }


def _times(**models: Found) -> dict[str, float]:
    """Return the seconds of each model's forward, and of all its attention layers."""
    return {f"{name}{of}": s for name, model in models.items() for of, s in model.seconds.items()}


def _sparse(heldout: Heldout) -> dict[str, Any]:
    job, seeds = heldout.job, heldout.job.seeds
    teacher = heldout.teacher()
    before = heldout.start(method_identity(job), partial(job.student, job.cfg.seed))
    after, others = before, []
    if job.trains:
        after = heldout.sparse("after", partial(job.trained, job.cfg.seed))
        others = [seed for seed in seeds if seed != job.cfg.seed]
    repeated = {seed: heldout.repeated(seed, partial(job.trained, seed)) for seed in others}
    found = dict.fromkeys(seeds, after.velocities) | repeated
    assert before.masks is not None and after.masks is not None
    masks = {"before": before.masks, "after": after.masks}
    write_masks(job.run_dir / MASKS, {when: report.selected for when, report in masks.items()})
    samples = heldout.compared(
        {"teacher": teacher.latents, "before": before.latents, "after": after.latents}
    )
    quality = samples["quality"]
    return {
        "trained": job.trains,
        "seeds": seeds,
        "sparsity": {
            "requested": job.cfg.sparsity,  # null where an error budget was given
            "planned": 1 - job.calibration.planned_density,
            "measured_before": 1 - masks["before"].mean_density,
            "measured_after": 1 - masks["after"].mean_density,
        },
        "velocity_error": {
            "before": heldout.errors(before.velocities, teacher.velocities),
            "after": {str(s): heldout.errors(v, teacher.velocities) for s, v in found.items()},
        },
        "heldout_loss": {
            "teacher": heldout.losses(teacher.velocities),
            "before": heldout.losses(before.velocities),
            "after": heldout.losses(after.velocities),
        },
        "forward_seconds": _times(teacher=teacher, student=after),
        "layers": list(masks["after"].density),
        "density": {n: [d.tolist() for d in m.density.values()] for n, m in masks.items()},
        "recall": {n: [r.tolist() for r in m.recall.values()] for n, m in masks.items()},
        "hit_rate": {  # of q and of k clusters along the samples, [layer][2][head]
            n: [rate.tolist() for rate in one.hit_rate.values()]
            for n, one in (("before", before), ("after", after))
        },
        "samples": samples
        | {
            "psnr_to_teacher": {
                n: quality[f"teacher/{n}"]["psnr"] if quality else [] for n in ("before", "after")
            }
        },
    }


def _dense(heldout: Heldout) -> dict[str, Any]:
    """Measure a dense model: its loss on both splits, samples, and what moved it if it is tuned."""
    job = heldout.job
    is_tuned = job.trains and job.is_pretrained
    own = "after" if is_tuned else "teacher"
    make = partial(job.trained, job.cfg.seed) if job.trains else job.dense
    model = heldout.dense(own, make, is_reference=not is_tuned)
    reference = heldout.teacher() if is_tuned else model
    losses = {
        "train": _by_level(model.train_losses),
        "heldout": _by_level(heldout.losses(model.velocities)),
    }
    latents = {own: model.latents, "teacher": reference.latents}
    samples = heldout.compared(latents | {"other_noise": reference.other_noise})
    quality = samples["quality"]
    result: dict[str, Any] = {
        "trained": job.trains,
        "flow_matching_loss": losses,
        "heldout_loss": {"after": heldout.losses(model.velocities)},
        "forward_seconds": _times(student=model),
        "samples": samples
        | {
            "psnr_to_real": quality[f"real/{own}"]["psnr"] if quality else [],
            "repeat_first_psnr": quality["real/repeat"]["psnr"] if "real/repeat" in quality else [],
        },
    }
    if is_tuned:
        errors = heldout.errors(model.velocities, reference.velocities)
        result["velocity_error"] = {"after": {str(job.cfg.seed): errors}}
    if heldout.options.floor:
        result["floor"] = {"backends": reference.backends}
    return result


def _by_level(losses: list[list[float]]) -> list[float]:
    return [sum(level) / len(level) for level in zip(*losses, strict=True)]
