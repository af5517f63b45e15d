"""The page of numbers: Markdown tables, a verdict on each expectation and the Pareto plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.train.files import write_atomic
from gossamer.train.reporting.sweep import pareto_front
from gossamer.train.study.data import Cell, Study
from gossamer.train.study.expectations import SAME_DENSITY, steps_to, summary, verdicts
from gossamer.train.study.statistics import bootstrap, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {
    "A-random": "random blocks, untrained",
    "A-topk": "Top-k, untrained",
    "A-topp": "Top-p, untrained",
    "A-hybrid": "Hybrid with one p, untrained",
    "A-svg1": "SVG1, untrained",
    "A-svg2": "SVG2, untrained",
    "A-ear": "SVG-EAR, untrained",
    "A-heads": "budgets and order per head, untrained",
    "A-heads-centroid": "the same with centroids, untrained",
    "B": "Hybrid with one p, diffusion loss",
    "C": "Hybrid with one p, distilled (published start)",
    "D": "budgets and order per head, distilled",
    "E": "D with trained budgets",
    "F": "D with trained centroid compensation",
    "G": "Top-k, distilled",
    "H": "Top-p, distilled",
    "I": "random blocks, distilled",
    "J": "dense, diffusion loss (control)",
    "K": "D with linear compensation (SLA)",
    "T": "the teacher itself",
}
KINDS = {
    "few": "trained on few clips",
    "other": "trained on another film",
    "slow": "a third of the learning rate",
    "fast": "three times the learning rate",
}
MEASURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "flip": "Perceptual distance (FLIP, lower is better)",
    "vmaf": "VMAF",
    "temporal_psnr": "PSNR of frame differences, dB",
}
PLOT = "numbers_pareto.png"


def write_numbers(lines: Sequence[Mapping[str, Any]], path: Path, *, source: str) -> Path:
    """Write the page and, beside it, the Pareto plot; return the page's path."""
    study = Study.of(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    has_plot = draw_pareto(study, path.parent / PLOT)
    write_atomic(path, "\n".join(page(study, source=source, has_plot=has_plot)) + "\n")
    return path


def page(study: Study, *, source: str, has_plot: bool) -> Iterator[str]:
    """Yield the lines of the page."""
    line = study.any_line
    settings = line["settings"]
    yield from (
        "# Numbers",
        "",
        f"Made from `{source}` by `python -m gossamer.train.study numbers`; do not edit.",
        "",
        f"Device: {line['device']}. Held-out clips: {len(line['clips'])} of "
        f"{len({clip['shot'] for clip in line['clips']})} shots, noise levels "
        f"{', '.join(f'{level:g}' for level in line['noise_levels'])}. Samples: "
        f"{settings['evaluation.sample_steps']} steps. Training: {settings['steps']} steps of "
        f"{settings['batch_size']} clips. Intervals are 95 % by bootstrap over shots and seeds, "
        "paired by clip.",
        "",
        "## What we expected",
        "",
        summary(found := verdicts(study)),
        "",
        *(f"- **{v.status}** — {v.expected}. {v.found}" for v in found),
        "",
    )
    yield from _floor(study)
    yield "## Relative velocity error to the teacher"
    yield ""
    yield "Mean over clips, noise levels and seeds; in brackets the interval. Lower is better."
    yield ""
    yield from _by_sparsity(study, _error)
    for sparsity in study.sparsities:
        yield from _by_level(study, sparsity)
    yield "## Before training, and what was really computed"
    yield ""
    yield "Error of the untrained start; density realised on the held-out clips after training."
    yield ""
    yield from _by_sparsity(study, _start)
    for measure, title in MEASURES.items():
        for pair, other in (("teacher/after", "teacher's sample"), ("real/after", "real clip")):
            if any(cell.quality(pair, measure) is not None for cell in study.cells.values()):
                yield f"## {title}, to the {other}"
                yield ""
                yield from _by_sparsity(study, _quality(pair, measure))
    yield "## Cost"
    yield ""
    yield (
        "Steps and GPU-seconds until C's last error at the same sparsity, on the clips watched in "
        "training; seconds of a training step; peak memory of training; then, of one batch of "
        "held-out clips, a sampling step and all its self-attentions (order, mask and kernels), "
        "in milliseconds and how many times faster than the dense teacher's in the same process. "
        "Times are of jobs that had their GPU for themselves; without one the place is empty."
    )
    yield ""
    for sparsity in study.sparsities:
        yield from _cost(study, sparsity)
    if has_plot:
        yield from ("## Pareto front", "", f"![error against sparsity and speed]({PLOT})", "")
        for name, words in (("sparsity", "sparsity"), ("speedup", "speed of a sampling step")):
            yield f"Error against {words}: {_front(study, name)}."
            yield ""


def _floor(study: Study) -> Iterator[str]:
    """Yield what the teacher's distance from itself, and the control's, make of the figures."""
    rows = []
    teacher, control = study.get("T", 0.0), study.get("J", 0.0)
    if teacher is not None and "floor" in teacher.rows[0]:
        for name, errors in teacher.rows[0]["floor"]["backends"].items():
            error = np.mean(errors)
            rows.append((f"teacher, attention backend {name}: velocity error", f"{error:.2g}"))
    if teacher is not None:
        for pair, words in (
            ("teacher/other_noise", "teacher, another noise: PSNR to its sample, dB"),
            ("real/teacher", "teacher: PSNR to the real clip, dB"),
            ("real/first", "the first frame repeated: PSNR to the real clip, dB"),
            ("real/repeat", "the given frames held: PSNR to the real clip, dB"),
        ):
            found = teacher.quality(pair, "psnr")
            if found is not None:
                rows.append((words, bootstrap([found], teacher.sampled_shots, mean).text(2)))
        for measure in MEASURES:
            found = teacher.quality("teacher/other_noise", measure)
            if found is not None and measure != "psnr":
                words = f"teacher, another noise: {MEASURES[measure]}, to its sample"
                rows.append((words, bootstrap([found], teacher.sampled_shots, mean).text(3)))
    if control is not None and control.after is not None:
        error = bootstrap([control.after.mean(-1)], control.shots, mean)
        rows.append(("J, dense fine-tuning: velocity error", error.text()))
        found = control.quality("teacher/after", "psnr")
        if found is not None:
            text = bootstrap([found], control.sampled_shots, mean).text(2)
            rows.append(("J, dense fine-tuning: PSNR to the teacher's sample, dB", text))
    if rows:
        yield from ("## Floor and ceiling", "", *_table(("what", "value"), rows), "")


def _by_sparsity(study: Study, figure: Callable[[Cell], str]) -> Iterator[str]:
    head = ("arm", *(f"{100 * s:g} %" for s in study.sparsities))
    rows = []
    for arm in study.arms:
        cells = [study.get(arm, s) for s in study.sparsities]
        texts = [figure(cell) if cell is not None else "" for cell in cells]
        if any(texts):
            rows.append((named(arm), *texts))
    yield from (*_table(head, rows), "")


def _by_level(study: Study, sparsity: float) -> Iterator[str]:
    levels = study.any_line["noise_levels"]
    rows = []
    for arm in study.arms:
        cell = study.get(arm, sparsity)
        if cell is not None and cell.after is not None:
            levelled = (cell.after[..., i] for i in range(len(levels)))
            texts = (bootstrap([x], cell.shots, mean, draws=500).text() for x in levelled)
            rows.append((named(arm), *texts))
    yield from (f"At {100 * sparsity:g} %, by noise level:", "")
    yield from (*_table(("arm", *(f"t = {level:g}" for level in levels)), rows), "")


def _cost(study: Study, sparsity: float) -> Iterator[str]:
    start = study.cells.get(("C", sparsity))
    goal = start.curve[-1, 2] if start is not None and start.curve is not None else None
    rows = []
    for arm in study.arms:
        cell = study.get(arm, sparsity)
        if cell is None or arm == "T":
            continue
        reached = None
        if goal is not None and cell.curve is not None:
            reached = steps_to(cell.curve, goal)
        steps = ("", "") if not cell.trained else ("never", "") if goal is not None else ("", "")
        if reached is not None:
            known = not np.isnan(reached[1])
            steps = (f"{reached[0]:.0f}", f"{reached[1]:.1f}" if known else "")
        figures = (
            *steps,
            _figure(cell.step_seconds, 3),
            _figure(cell.peak_memory, 1),
            _figure(cell.milliseconds("student"), 2),
            _figure(cell.speedup, 2),
            _figure(cell.milliseconds("student_attention"), 2),
            _figure(cell.faster("_attention"), 2),
        )
        if any(figures):
            rows.append((named(arm), *figures))
    head = (
        *("arm", "steps", "GPU-seconds", "s a step", "GiB"),
        *("sampling step, ms", "faster", "attention, ms", "faster"),
    )
    yield from (f"At {100 * sparsity:g} %:", "", *_table(head, rows), "")


def _error(cell: Cell) -> str:
    if cell.after is None:
        return ""
    return bootstrap([cell.after.mean(-1)], cell.shots, mean).text()


def _start(cell: Cell) -> str:
    if cell.before is None or cell.density is None:
        return ""
    off = abs(1 - cell.density - cell.sparsity) > SAME_DENSITY
    note = " (more than 0.1 points off)" if off else ""
    return f"{cell.before.mean():.3f}; {100 * cell.density:.2f} %{note}"


def _quality(pair: str, measure: str) -> Callable[[Cell], str]:
    def figure(cell: Cell) -> str:
        found = cell.quality(pair, measure)
        if found is None:
            return ""
        digits = 3 if measure in ("ssim", "flip") else 2
        return bootstrap([found], cell.sampled_shots, mean).text(digits)

    return figure


def named(arm: str) -> str:
    """Return an arm's letter and what it is."""
    base, _, kind = arm.partition("-")
    words = WORDS.get(arm) or WORDS.get(base, "")
    return f"{arm}: {words}" + (f", {KINDS[kind]}" if kind in KINDS else "")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


@dataclass(frozen=True)
class Point:
    """One arm at one sparsity in the plot."""

    arm: str
    error: float
    sparsity: float
    speedup: float | None


def draw_pareto(study: Study, path: Path) -> bool:
    """Save error against sparsity and against the speed of a sampling step; False without data."""
    points = _points(study)
    if points:
        _pareto(points).savefig(path, dpi=144)
    return bool(points)


def _points(study: Study) -> list[Point]:
    return [
        Point(cell.arm, float(cell.after.mean()), cell.sparsity, cell.speedup)
        for _, cell in sorted(study.cells.items())
        if cell.sparsity > 0 and cell.after is not None
    ]


def _front(study: Study, name: str) -> str:
    """Return the arms that no other beats in error and in sparsity or speed, in words."""
    shown = [point for point in _points(study) if getattr(point, name) is not None]
    x = np.array([getattr(point, name) for point in shown], dtype=np.float64)
    front = [shown[i] for i in pareto_front(x, np.array([point.error for point in shown]))]
    return "; ".join(
        f"{point.arm} at {100 * point.sparsity:g} % ({point.error:.3f}"
        + (f", {point.speedup:.2f}x)" if point.speedup is not None else ")")
        for point in front
    )


def _pareto(points: Sequence[Point]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    arms = sorted({point.arm for point in points})
    colours = colormaps["tab20"](np.linspace(0, 1, max(2, len(arms))))
    for axes, name, label in (
        (panels[0], "sparsity", "sparsity asked for"),
        (panels[1], "speedup", "sampling step, times faster than dense"),
    ):
        shown = [point for point in points if getattr(point, name) is not None]
        x = np.array([getattr(point, name) for point in shown], dtype=np.float64)
        y = np.array([point.error for point in shown])
        for arm, colour in zip(arms, colours, strict=False):
            own = [i for i, point in enumerate(shown) if point.arm == arm]
            style = ":" if arm.startswith("A-") else "-"
            axes.plot(x[own], y[own], style, marker="o", ms=4, color=colour, label=arm)
        front = pareto_front(x, y)
        axes.step(x[front], y[front], "k--", lw=1, where="pre", label="Pareto front")
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.4)
    panels[0].set(ylabel="relative velocity error")
    panels[1].legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
