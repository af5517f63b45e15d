"""Compare allocations on the untrained student: velocity error on held-out clips at equal density.

    python -m gossamer.train.allocation_study [--sparsity 0.8 0.9 ...] [--repeats 3] recipe=demo ...
    python -m gossamer.train.allocation_study recipe=demo --methods [--block 32 16]
    python -m gossamer.train.allocation_study recipe=demo --out benchmarks/results/allocation.md

With --methods the arms are the published methods as `attach(pipe, method=...)` gives them, nothing
calibrated, each head with the same budget; --block is the tokens of a q and a kv block or cluster.
Each repeat calibrates on other training clips with other probes; an allocation that measures
nothing is run once. `velocity_per_level` has budgets for each noise level alone, which a run cannot
use yet: it shows what noise-level bins would gain.
The data is encoded first, unless it is there.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gossamer.sparse.allocation import Allocation, EqualError, Uniform, WaterFill
from gossamer.sparse.attach import attach, attentions, detach, family_of, method_from_spec
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.methods import NAMES, method_named
from gossamer.train.calibrate import Calibrator
from gossamer.train.calibration import set_masks
from gossamer.train.config import compose
from gossamer.train.evaluate import velocities
from gossamer.train.gauge import Gauge
from gossamer.train.job import Job, make_accelerator
from gossamer.train.measures import Sample
from gossamer.train.model import velocity
from gossamer.train.refusal import in_one_line
from gossamer.train.samples import evenly, noisy_samples
from gossamer.train.stages import encode_stage
from gossamer.train.study_output import Line, add_output, environment, leave

log = logging.getLogger(__name__)

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "mass": EqualError(measure="mass"),
    "error": EqualError(measure="relative_l1"),
    "water_fill_output": WaterFill(measure="output"),
    "water_fill_fisher": WaterFill(measure="fisher"),
    "velocity": WaterFill(measure="velocity"),
    "velocity_exact": WaterFill(measure="velocity_exact"),
}
TITLE, ERROR = "Velocity error of the untrained sparse model", "relative velocity error"
PER_LEVEL = "velocity_per_level"


@in_one_line
def main(arguments: list[str]) -> int:
    """Print a Markdown table, mean and range over repeats, and leave it with a plot at --out."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.train.allocation_study")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--repeats", type=int, default=3)
    arms = [*ALLOCATIONS, PER_LEVEL]
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--block", type=int, nargs=2, default=[32, 16])
    add_output(parser)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.methods:
        options.arms = [*NAMES]
    cfg = compose(options.overrides)
    job = Job(cfg, make_accelerator(cfg), [])
    encode_stage(job)
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with job.autocast():
        for arm, sparsity, error, density in _measure(job, options):
            found.setdefault((arm, sparsity), []).append((error, density))
            sys.stderr.write(f"{arm} at {sparsity}: {error:.4f}, density {density:.4f}\n")
    table = _table(found, options)
    sys.stdout.write("\n".join(table) + "\n")
    command = shlex.join(["python", "-m", "gossamer.train.allocation_study", *arguments])
    header = environment(command, options.commit, job.device.type)
    leave(options, TITLE, header, table, _lines(found, options), x="sparsity", y=ERROR)
    return 0


def _measure(job: Job, options: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    settings, heldout = job.cfg.evaluation, job.dataset("heldout")
    levels = list(job.cfg.calibration.noise_levels)
    clips = [heldout[i] for i in evenly(len(heldout), settings.clips)]
    samples = noisy_samples(clips, levels, settings.batch_size, job.device)
    teacher, method = job.dense(), method_from_spec(job.method_spec)
    target = velocities(teacher, samples, "teacher")
    if options.methods:
        yield from _published(detach(teacher), samples, target, options)
        return
    student = attach(job.source.load(job.cfg.seed), method).to(job.device)
    student.requires_grad_(False).eval()
    num_clips = len(job.dataset("train"))
    chooses_orders = isinstance(method.layout, PerHead)  # by errors, whatever the budgets
    for repeat in range(options.repeats):
        order = torch.randperm(num_clips, generator=torch.Generator().manual_seed(repeat))
        calibrator = job.calibrator(teacher, order[: job.cfg.calibration.clips].tolist())
        calibrator.gauge.seed = repeat
        by_level = [_of_level(calibrator, level) for level in range(len(levels))]
        for arm in options.arms:
            if repeat and not (chooses_orders or arm == PER_LEVEL or ALLOCATIONS[arm].measure):
                continue
            for sparsity in options.sparsity:
                errors: list[float] = []
                densities: list[float] = []
                if arm == PER_LEVEL:
                    for level, alone in enumerate(by_level):
                        _give(student, alone, ALLOCATIONS["velocity"], sparsity)
                        error, density = _run(student, samples, target, level)
                        errors, densities = errors + error, densities + density
                else:
                    _give(student, calibrator, ALLOCATIONS[arm], sparsity)
                    errors, densities = _run(student, samples, target, None)
                yield (
                    arm,
                    sparsity,
                    float(torch.tensor(errors).mean()),
                    float(torch.tensor(densities).mean()),
                )


def _give(
    student: nn.Module, calibrator: Calibrator, allocation: Allocation, sparsity: float
) -> None:
    found = calibrator.budgets(allocation, sparsity=sparsity)
    set_masks(student, found.k, found.p, calibrator.gauge.choice)


def _published(
    model: nn.Module, samples: list[Sample], target: list[Tensor], options: argparse.Namespace
) -> Iterator[tuple[str, float, float, float]]:
    tokens = family_of(model).token_grid(model, {"hidden_states": samples[0].x}).num_tokens
    q, kv = options.block
    for name in NAMES:
        in_clusters = name in ("svg2", "svg_ear")
        sizes = (
            {"num_q": max(1, tokens // q), "num_kv": max(1, tokens // kv)}
            if in_clusters
            else {"q_block": q, "kv_block": kv}
        )
        for sparsity in options.sparsity:
            attach(model, method_named(name, sparsity, **sizes))
            errors, densities = _run(model, samples, target, None)
            detach(model)
            error, density = (float(torch.tensor(x).mean()) for x in (errors, densities))
            yield name, sparsity, error, density


def _of_level(calibrator: Calibrator, level: int) -> Calibrator:
    """Return a calibrator of one noise level alone."""
    gauge = calibrator.gauge
    samples = [
        Sample(0, s.x, s.t, s.text, s.condition, s.target)
        for s in gauge.samples
        if s.level == level
    ]
    return Calibrator(
        Gauge(
            gauge.teacher,
            gauge.method,
            samples,
            noise_levels=[gauge.noise_levels[level]],
            densities=gauge.densities,
            probes=gauge.probes,
            seed=gauge.seed,
        )
    )


@torch.no_grad()
def _run(
    student: nn.Module, samples: list[Sample], target: list[Tensor], level: int | None
) -> tuple[list[float], list[float]]:
    """Return relative velocity errors of each sample, and densities of each layer and head."""
    errors, densities = [], []
    for s, theirs in zip(samples, target, strict=True):
        if level in (None, s.level):
            mine = velocity(student, s.x, s.t, s.text, s.condition).cpu()
            change = (mine - theirs).flatten(1).norm(dim=1)
            errors += (change / theirs.flatten(1).norm(dim=1)).tolist()
            for attention in attentions(student).values():
                densities += attention.mask.density.flatten().tolist()
    return errors, densities


def _table(
    found: dict[tuple[str, float], list[tuple[float, float]]], options: argparse.Namespace
) -> list[str]:
    titles = [f"{100 * s:g} %: error (range) | density" for s in options.sparsity]
    lines = [
        f"| {'method' if options.methods else 'allocation'} | {' | '.join(titles)} |",
        "|---" * (1 + 2 * len(titles)) + "|",
    ]
    for arm in options.arms:
        cells = []
        for sparsity in options.sparsity:
            errors, densities = torch.tensor(found[arm, sparsity]).unbind(1)
            cells.append(f"{errors.mean():.4f} ({errors.min():.4f} to {errors.max():.4f})")
            cells.append(f"{densities.mean():.4f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _lines(
    found: dict[tuple[str, float], list[tuple[float, float]]], options: argparse.Namespace
) -> dict[str, dict[str, Line]]:
    lines = {}
    for arm in options.arms:
        errors = [torch.tensor(found[arm, sparsity])[:, 0] for sparsity in options.sparsity]
        low, mean, high = (
            [float(of(x)) for x in errors] for of in (torch.amin, torch.mean, torch.amax)
        )
        lines[arm] = Line(options.sparsity, mean, spread=(low, high))
    return {"untrained, held-out clips": lines}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
