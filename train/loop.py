"""The training loop: one order of events, exact resume, metrics always."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.attach import attentions, mask_parameters
from gossamer.sparse.attention import SparseAttention
from gossamer.train import checkpoint
from gossamer.train.data.dataset import batches, schedule_of
from gossamer.train.density_controller import DensityController
from gossamer.train.distiller import Distiller
from gossamer.train.health import WINDOW, Health, tell
from gossamer.train.interrupt import Stop, stoppable
from gossamer.train.optimizers import AdamW, Numbers
from gossamer.train.parallel import Parallel
from gossamer.train.processes import accepted, averaged
from gossamer.train.progress import Progress, parameter_groups
from gossamer.train.refusal import DiskFailed, Refusal
from gossamer.train.trackers import MetricsLog, Tracker
from gossamer.train.watch import Watch

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Numbers):
    """How long, how fast and how often; batch_size is the global batch of one optimizer step."""

    steps: int
    batch_size: int
    grad_accumulation: int = 1
    ema: float = 0.0
    num_workers: int = 0
    log_every: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    max_skipped: int = 10
    loss_spike: float = 10.0
    skip_spikes: bool = False
    seed: int = 0
    optimizer: AdamW = field(default_factory=AdamW)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine to final_lr * lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def micro_batch(self, processes: int) -> int:
        """Return the samples of one forward; Refusal when the batch does not divide evenly."""
        parts = processes * self.grad_accumulation
        if self.batch_size % parts:
            raise Refusal(
                "batch_size",
                self.batch_size,
                f"a multiple of {parts} ({processes} processes x grad_accumulation "
                f"{self.grad_accumulation})",
                f"set batch_size={-(-self.batch_size // parts) * parts}, or less grad_accumulation",
            )
        return self.batch_size // parts


def train(
    distiller: Distiller,
    dataset: Any,
    accelerator: Accelerator,
    settings: TrainSettings,
    *,
    folder: Path,
    tracker: Tracker,
    title: str = "train",
    density: float = 1.0,
    watch: Watch | None = None,
    parallel: Parallel | None = None,
) -> Progress:
    """Train the student up to settings.steps, from the newest checkpoint of `folder` if any.

    `density` is what the mean density of trained budgets is held at. What `watch` finds is in the
    metrics of its steps and of a step 0; the seconds of a step do not count it. A step whose loss
    or gradient is not finite in any process is left out in all; the checkpoint that is due after it
    waits for one that counts, but for the last.
    The first SIGTERM or SIGINT, to any process, lets the step finish, saves it and raises
    SystemExit of 143 or 130; `accelerate launch` then ends with a code of its own. A second one
    ends the process at once.
    """
    checkpoints = folder / "checkpoints"
    parallel = parallel or Parallel(accelerator)
    micro_batch = settings.micro_batch(parallel.data_processes)
    student = parallel.place(distiller.student).train()
    progress = Progress(
        student,
        settings.optimizer.make(parameter_groups(student, settings)),
        DensityController(student, density, accelerator, parallel.sequence),
        Health(settings.max_skipped, settings.loss_spike, settings.skip_spikes),
        accelerator.mixed_precision,
    )
    if settings.ema:
        progress.start_ema()
    newest = checkpoint.latest(checkpoints, parallel.together)
    if newest is not None:
        accepted(partial(progress.restore, newest), parallel.together)
        if settings.ema and not progress.ema:
            progress.start_ema()
        log.info("resumed from %s at step %d of %d", newest, progress.step, settings.steps)
    if accelerator.is_main_process:
        checkpoint.clean(checkpoints)
    if progress.step >= settings.steps:
        return progress
    rows = None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        rows = MetricsLog(folder / "metrics.jsonl")
        rows.truncate_after(progress.step or -1)  # step 0 is measured anew
    wrapped = parallel.wrap(distiller)
    data = batches(
        dataset,
        schedule_of(dataset, settings.batch_size, settings.seed),
        start_step=progress.step,
        rank=parallel.data_rank,
        world=parallel.data_processes,
        micro_batch=micro_batch,
        num_workers=settings.num_workers,
        num_steps=settings.steps - progress.step,
        pin_memory=accelerator.device.type == "cuda",
    )
    if watch and rows is not None and progress.step == 0:
        with accelerator.autocast():
            rows.append({"step": 0, **watch(student)})
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    failed_saves, due = 0, False
    bar = tqdm(
        total=settings.steps,
        initial=progress.step,
        desc=title,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with bar, stoppable() as stop:
        for metrics in _steps(
            wrapped, distiller, dataset, data, parallel, progress, settings, stop
        ):
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.4g}")
            is_last = progress.step == settings.steps
            if rows is not None:
                if watch and (is_last or progress.step % watch.every == 0):
                    with accelerator.autocast():
                        metrics |= watch(student)
                rows.append({"step": progress.step, **metrics})
                if progress.step % settings.log_every == 0:
                    tracker.log(progress.step, metrics)
            last = is_last or stop.agreed is not None
            due = due or progress.step % settings.checkpoint_every == 0
            if (due and progress.health.is_well) or last:
                due = False
                if rows is not None:
                    rows.sync()
                kept = settings.keep_checkpoints
                saved = progress.save(checkpoints, kept, parallel.together)
                failed_saves = 0 if saved else failed_saves + 1
                if failed_saves >= MAX_FAILED_SAVES or (failed_saves and last):
                    raise DiskFailed(
                        "checkpoints", checkpoints, "a disk that takes them", "free some space"
                    )
            if stop.agreed is not None:
                log.info(
                    "stopped by %s: step %d of %d is saved in %s; the same command goes on from it",
                    stop.agreed.name,
                    progress.step,
                    settings.steps,
                    checkpoints,
                )
                raise SystemExit(128 + stop.agreed)
    return progress


def _steps(
    wrapped: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    distiller: Distiller,
    dataset: Any,
    data: Iterator[dict[str, Tensor]],
    parallel: Parallel,
    progress: Progress,
    settings: TrainSettings,
    stop: Stop,
) -> Iterator[dict[str, float]]:
    """Do one optimizer step at a time, by `wrapped` that holds the distiller; yield its metrics."""
    accelerator = parallel.accelerator
    masks = set(mask_parameters(progress.student).values())
    parameters = [p for p in progress.named_parameters().values() if p not in masks]
    learned = [p for p in progress.named_parameters().values() if p in masks]
    micro = settings.micro_batch(parallel.data_processes)
    while progress.step < settings.steps:
        start = time.monotonic()
        lr = settings.lr_at(progress.step)
        for group in progress.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]
        parts: list[tuple[dict[str, Tensor], Tensor]] = []
        waited = 0.0
        for part in range(settings.grad_accumulation):
            asked = time.monotonic()
            batch = next(data)
            batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
            forwards = parallel.data_rank * settings.grad_accumulation + part
            first = progress.step * settings.batch_size + forwards * micro
            batch["position"] = torch.arange(first, first + micro)  # numbers the run's samples
            waited += time.monotonic() - asked
            last = part + 1 == settings.grad_accumulation
            with parallel.accumulating(wrapped) if not last else nullcontext():
                losses = wrapped(batch)
                loss = torch.stack(list(losses.values())).sum() / settings.grad_accumulation
                accelerator.backward(loss)
            parts.append((batch, loss.detach()))
        parallel.average_whole([*parameters, *learned])
        norms = {"grad_norm": parallel.norm(parameters)}
        if learned:  # not clipped: AdamW bounds their steps, and they must not shrink the others'
            norms["mask_grad_norm"] = parallel.norm(learned)
        # waits for this step, so that a signal during it still counts
        own = [float(x) for x in (*(loss for _, loss in parts), *norms.values())]
        told = [*own, mean_density(progress.student), *stop.votes]
        means = averaged(told, accelerator)
        density, votes = means[len(own)], means[len(own) + 1 :]
        stop.agree(votes)
        measured = {"loss": sum(means[: len(parts)])}
        measured |= zip(norms, means[len(parts) : len(own)], strict=True)
        bad = progress.health.judge(progress.step + 1, measured)
        if bad:
            tell(
                bad,
                progress.step + 1,
                distiller,
                [(batch, loss) for (batch, _), loss in zip(parts, own, strict=False)],
                dataset,
                progress.health,
                accelerator,
            )
        if progress.health.is_failing:
            raise Refusal(
                "steps",
                f"{progress.health.skipped} of the last {WINDOW} left out ({bad})",
                f"at most max_skipped={settings.max_skipped}",
                "lower optimizer.lr, or see the clips named above; the last checkpoint before "
                "them is kept",
            )
        if progress.health.is_well:
            parallel.clip(parameters, norms["grad_norm"], settings.clip)
            measured |= progress.controller.before_step()
            progress.optimizer.step()
            progress.controller.after_step()
        progress.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        if progress.ema and progress.health.is_well:
            progress.update_ema(settings.ema)
        seconds = time.monotonic() - start
        yield {
            "lr": lr,
            "density": density,
            **measured,
            "skipped": progress.health.skipped,
            "step_seconds": seconds,
            "data_seconds": waited,
            "data_share": waited / seconds,
            **_memory(accelerator.device),
        }


def _memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that tensors took on a GPU since the training began, in GiB."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def mean_density(model: nn.Module) -> float:
    """Return the mean density of the masks of the last forward; 1 for dense attention."""
    masks = [a.mask for a in attentions(model).values() if isinstance(a, SparseAttention)]
    densities = [mask.density.mean() for mask in masks if mask is not None]
    return float(torch.stack(densities).mean()) if densities else 1.0
