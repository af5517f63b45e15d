"""The main job: encode, calibrate, train, evaluate, export, report, each skipped when done."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from gossamer import __version__
from gossamer.train.check import check_launch, preflight
from gossamer.train.config import fingerprint, save_config
from gossamer.train.evaluation import EVALUATION, evaluate_stage
from gossamer.train.files import write_atomic
from gossamer.train.job import Job, Kept, make_accelerator
from gossamer.train.launch import Launch
from gossamer.train.memory_limit import within_memory
from gossamer.train.processes import accepted, check_alike, on_main, said_once
from gossamer.train.pulse import Pulse
from gossamer.train.report import headline
from gossamer.train.reporting.run import Run
from gossamer.train.results import EXPORT, check_export, export_stage, report_stage
from gossamer.train.run_dir import CONFIG, PER_PROCESS, RESULT, check_run_dir, flat
from gossamer.train.run_lock import RunLock
from gossamer.train.stages import calibrate_stage, encode_stage, train_stage

log = logging.getLogger(__name__)

STAGES: dict[str, Callable[[Job], None]] = {
    "encode": encode_stage,
    "calibrate": calibrate_stage,
    "train": train_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": report_stage,
}
EVERYONES = ("encode", "calibrate", "train")  # stages that all processes do together


def run(
    cfg: DictConfig, stages: list[str] | None = None, *, kept: Kept | None = None
) -> dict[str, Any]:
    """Run the stages of a config and return the headline figures.

    Raises Refusal for bad input before any heavy work; a run folder of another config is refused.
    """
    start = time.monotonic()
    todo = list(stages if stages is not None else cfg.stages)
    check_launch(cfg)
    job = Job(cfg, make_accelerator(cfg), todo, kept)
    together = job.together

    def work(stage: str) -> None:
        with within_memory(job, stage):
            STAGES[stage](job)

    with ExitStack() as stack:
        stack.enter_context(Pulse(job.accelerator))
        lock = RunLock(job.run_dir)

        def open_run_dir() -> None:
            stack.enter_context(lock)
            check_run_dir(cfg, job.run_dir)
            _check_earlier(job)
            check_export(job)
            save_config(cfg, job.run_dir / CONFIG)

        if together.processes > 1:
            with said_once(job.accelerator):
                check_alike(_shared_settings(job), job.accelerator)
        accepted(partial(preflight, cfg, todo), together)
        on_main(open_run_dir, job.accelerator)
        accepted(partial(lock.check_seen, together.gather(lock.holder)[0]), together)
        job.log("device %s, attention backend %s, run %s", job.device, cfg.backend, job.run_dir)
        for stage in (s for s in STAGES if s in todo):
            if stage in EVERYONES:
                work(stage)
            else:
                on_main(partial(work, stage), job.accelerator)
        job.accelerator.wait_for_everyone()
        main = job.accelerator.is_main_process
        return _finish(job, todo, time.monotonic() - start) if main else {}


def _check_earlier(job: Job) -> None:
    """Refuse stages that need what no stage has made, before the folder is this config's."""
    todo = set(job.stages)
    if job.is_sparse and "calibrate" not in todo and todo & {"train", "evaluate", "export"}:
        job.calibration  # noqa: B018 (refuses what is not there)
    if "train" not in todo:
        every = job.seeds if job.trains and "evaluate" in todo else []
        for seed in every or [job.cfg.seed] * ("export" in todo):
            job.newest_checkpoint(seed)
    if "report" in todo and "evaluate" not in todo:
        Run.read(job.run_dir)


def _shared_settings(job: Job) -> dict[str, object]:
    """Return what decides a run's result and its order of calls, but for the data itself."""
    launch, software = asdict(Launch.read()), {"gossamer": __version__, "torch": torch.__version__}
    precision = {"mixed_precision": job.accelerator.mixed_precision}
    return {**flat(job.cfg, PER_PROCESS), **launch, **precision, **software}


def _finish(job: Job, stages: list[str], seconds: float) -> dict[str, Any]:
    """Write result.json once the last stage is done, and return it."""
    path = job.run_dir / EVALUATION
    metrics = headline(json.loads(path.read_text())) if path.is_file() else {}
    result = {
        "config_fingerprint": fingerprint(job.cfg),
        "finished": _is_whole(job, stages),
        "mixed_precision": job.accelerator.mixed_precision,
        "weights": job.weights_stamp,
        "seconds": seconds,
        "stages": stages,
        "metrics": metrics,
    }
    if result["finished"]:
        write_atomic(job.run_dir / RESULT, json.dumps(result, indent=2) + "\n")
        if metrics:
            _summarise(job, metrics)
    return result


def _is_whole(job: Job, stages: list[str]) -> bool:
    """Say whether the config's stages are done, in one call or each in its own."""
    made = {"evaluate": EVALUATION, "export": EXPORT}
    left = [s for s in job.cfg.stages if s in made and not (job.run_dir / made[s]).exists()]
    return stages == list(job.cfg.stages) or (stages[-1] == "report" and not left)


def _summarise(job: Job, found: dict[str, Any]) -> None:
    """Log the headline figures and where the report and the export are: a run's last lines."""
    if job.is_sparse:
        where = (
            f"relative velocity error to the dense teacher at sparsity "
            f"{found['measured_sparsity']:.3f}, {found['num_clips']} held-out clips x "
            f"{found['num_noise_levels']} noise levels: {found['error_before']:.4f} training-free"
        )
        job.log("%s%s", where, _trained(found) if job.trains else "")
    else:
        job.log(
            "flow-matching loss: %.4f train, %.4f held out",
            found["train_loss"],
            found["heldout_loss"],
        )
        if found["psnr_to_real"] is not None:
            job.log("samples: %.2f dB to the real clips", found["psnr_to_real"])
    for name, path in {"export": "export", "report": "report/index.html"}.items():
        if (job.run_dir / path).exists():
            job.log("%s: %s", name, job.run_dir / path)


def _trained(found: dict[str, Any]) -> str:
    spread = found["error_after_sd"]
    around = f" ± {spread:.4f} over {found['num_seeds']} seeds" if spread is not None else ""
    gain = found["reduction_percent"]
    change = f"{abs(gain):.1f} % {'less' if gain >= 0 else 'more'}"
    return f", {found['error_after']:.4f}{around} distilled ({change})"
