"""The stages up to a trained student: encode, calibrate, train."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from gossamer.train import loop, shared_calibration
from gossamer.train.calibration import CALIBRATION, Calibration
from gossamer.train.check_data import check_splits
from gossamer.train.compiling import compiled, compiling
from gossamer.train.config import build, data_dir, data_url, encode_settings
from gossamer.train.data.encode import encode
from gossamer.train.data.shards import Manifest
from gossamer.train.distiller import Distiller
from gossamer.train.files import is_seen, write_atomic
from gossamer.train.negative import store_negative
from gossamer.train.processes import accepted, agreed, check_same, on_main, said_once
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import RunLock
from gossamer.train.teach import write_cache
from gossamer.train.teacher import Cached
from gossamer.train.watch import watch_of
from gossamer.train.weights import digest

if TYPE_CHECKING:
    from gossamer.train.job import Job

REPORT = "calibration.txt"  # what calibration printed
NO_TRACKER = "gossamer.train.trackers.NoTracker"


def encode_stage(job: "Job") -> None:
    """Encode the source into latent shards, and for a cached teacher its velocities.

    What is there already stays. All processes share the velocities.
    """
    on_main(partial(_encode_data, job), job.accelerator)
    accepted(partial(_check_encoded, job), job.together)
    teacher = build(job.cfg.teacher)
    if isinstance(teacher, Cached):
        write_cache(job, teacher.folder(job.cfg))


def _encode_data(job: "Job") -> None:
    folder = data_dir(job.cfg)
    if data_url(job.cfg) or "source" not in job.cfg.data:
        store_negative(job.cfg)
        return
    # Built here, not job.text: a large text encoder must not stay on the device for the training.
    codec, text = (build(job.cfg[name]).to(job.device) for name in ("codec", "text"))
    # Only while encoding: finished data may be read by many runs at once.
    # A worker waits for another one that encodes the same, and finds it there.
    is_worker = job.kept is not None
    is_there = Manifest.load(folder) is not None
    with nullcontext() if is_there else RunLock(folder, "data.dir", wait=is_worker):
        manifest = encode(
            job.cfg.data.source,
            folder,
            codec=codec,
            text=text,
            num_workers=max(2, job.cfg.num_workers),
            **encode_settings(job.cfg),
        )
    store_negative(job.cfg, text)
    check_splits(manifest, folder, job.stages)


def _check_encoded(job: "Job") -> None:
    folder = data_dir(job.cfg)
    if not is_seen(lambda: Manifest.load(folder) is not None):
        fix = "put it on a disk that all machines share, or a copy of it on each"
        raise Refusal("data.dir", folder, "encoded data, which process 0 has there", fix)


def calibrate_stage(job: "Job") -> None:
    """Find the mask budgets on the dense teacher, unless they are there; all processes share it."""
    if not job.is_sparse:
        return
    is_there = on_main(partial(_is_calibrated, job), job.accelerator)
    if agreed(bool(is_there), job.accelerator):
        return
    calibrator, allocation = job.own_calibrator(), build(job.cfg.allocation)
    with job.autocast(), said_once(job.accelerator):
        result = calibrator.run(allocation, **_asked(job))
    made_for = {**job.masks_asked, "weights": digest(calibrator.gauge.teacher)}
    if job.kept is not None:
        calibrator.gauge.teacher.cpu()  # for the next job; this one needs the device's memory
    on_main(partial(_keep, job, replace(result, made_for=made_for)), job.accelerator)


def _asked(job: "Job") -> dict[str, float | None]:
    return {name: job.cfg[name] for name in ("sparsity", "error_budget")}


def _keep(job: "Job", result: Calibration) -> None:
    """Write what calibration found and say it, for this run and for others of a sweep."""
    from gossamer.train.reporting.calibration import draw, lines

    result.save(job.calibration_dir)
    draw(result, job.calibration_dir)
    said = lines(result)
    write_atomic(job.calibration_dir / REPORT, "\n".join(said) + "\n")
    name, value = next((n, v) for n, v in _asked(job).items() if v is not None)
    job.log(
        "calibrated in %.0f s: planned sparsity %.4f (asked: %s %g)",
        result.seconds,
        1 - result.planned_density,
        name,
        value,
    )
    for line in said:
        job.log("%s", line)
    shared_calibration.leave(job)


def _is_calibrated(job: "Job") -> bool:
    """Return whether the run's calibration is there, or an equal run's that it can take.

    One that was forced to change is not.
    """
    return _has_own(job) or shared_calibration.take(job)


def _has_own(job: "Job") -> bool:
    if not (job.calibration_dir / CALIBRATION).is_file():
        return False
    if job.cfg.calibration.path is None:
        difference = Calibration.load(job.calibration_dir).differs(job.masks_asked)
        if difference:
            job.log("calibrating again: %s", difference)
            return False
    return bool(job.calibration)  # refuses one of other masks


def train_stage(job: "Job") -> None:
    """Train a student for each seed, each from its newest checkpoint."""
    with compiling(job):
        _train_seeds(job)


def _train_seeds(job: "Job") -> None:
    optimizer = build(job.cfg.optimizer)
    names = (
        "steps",
        "batch_size",
        "grad_accumulation",
        "ema",
        "num_workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_skipped",
        "loss_spike",
        "skip_spikes",
    )
    loss = build(job.cfg.loss)
    on_main(partial(store_negative, job.cfg), job.accelerator)
    teacher = job.teacher() if loss.needs_teacher else None
    dataset = job.dataset("train")
    fix = "give every machine the same folder, or the same copy of it"
    check_same("data.dir", dataset.manifest, job.accelerator, fix)
    watch = watch_of(job) if job.accelerator.is_main_process else None
    for seed in job.seeds:
        settings = loop.TrainSettings(
            seed=seed,
            optimizer=optimizer,
            **asdict(optimizer),
            **{name: job.cfg[name] for name in names},
        )
        folder = job.seed_dir(seed)
        student = compiled(job.student_on_cpu(seed), job.cfg)
        tracker = build(job.cfg.tracker if seed == job.cfg.seed else {"_target_": NO_TRACKER})
        if job.accelerator.is_main_process:
            tracker.start(folder, redact(OmegaConf.to_container(job.cfg, resolve=True)))
        try:
            loop.train(
                Distiller(student, teacher, loss, job.draws(seed)),
                dataset,
                job.accelerator,
                settings,
                folder=folder,
                tracker=tracker,
                title=f"train seed {seed}",
                density=1 - job.sparsity,
                watch=watch,
                parallel=job.parallel,
            )
        finally:
            tracker.finish()
        job.accelerator.free_memory()
