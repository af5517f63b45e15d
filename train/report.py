"""Reports: one self-contained HTML page with its plots beside it, for a run and for a sweep."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal
from gossamer.train.reporting import errors, page, sections
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.run import Array, Run, VelocityError
from gossamer.train.reporting.sweep import sweep_sections

Section = Callable[[Run], Html]

STUDENT: tuple[Section, ...] = (
    errors.meaning,
    errors.noise_levels,
    errors.clips,
    sections.training,
    sections.masks,
    sections.calibration_curves,
    sections.calibration_choices,
    sections.videos,
    sections.config,
)
DENSE: tuple[Section, ...] = (
    errors.dense_noise_levels,
    sections.training,
    sections.videos,
    sections.config,
)


def report(run_dir: Path) -> Path:
    """Write run_dir/report/index.html and its pictures, and return the page's path.

    Reads only files of the run. Refusal where the run was not evaluated.
    """
    run = Run.read(run_dir)
    _empty(run.report)
    first = errors.headline_section(headline(run.evaluation))
    rest = [
        section(run)
        for section in tqdm(DENSE if run.is_dense else STUDENT, desc="report", unit="section")
    ]
    kind = "a dense model" if run.is_dense else "a sparse student against its dense teacher"
    subtitle = f"Gossamer report: {kind}."
    return _write_page(
        run.report, page.document(run.folder.resolve().name, subtitle, [first, *rest])
    )


def headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that sum up an evaluation; None for what it does not hold.

    Errors are means over clips and noise levels, `after` also over seeds; `_sd` is the sample
    standard deviation over seeds, None for one seed. Shares are from 0 to 1.
    """
    if "flow_matching_loss" in evaluation:
        return _dense_headline(evaluation)
    error = VelocityError.read(evaluation)
    before, after = float(error.before.mean()), error.seed_means
    reductions = 100 * (1 - after / before)
    closer = error.after.mean((0, 2)) < error.before.mean(1)
    sparsity = evaluation.get("sparsity") or {}
    psnr = (evaluation.get("samples") or {}).get("psnr_to_teacher") or {}
    return {
        "error_before": before,
        "error_after": float(after.mean()),
        "error_after_sd": _deviation(after),
        "reduction_percent": float(reductions.mean()),
        "reduction_percent_sd": _deviation(reductions),
        "requested_sparsity": sparsity.get("requested"),
        "planned_sparsity": sparsity.get("planned"),
        "measured_sparsity_before": sparsity.get("measured_before"),
        "measured_sparsity": sparsity.get("measured_after"),
        "psnr_before": _mean(psnr.get("before")),
        "psnr_after": _mean(psnr.get("after")),
        "step_speedup": _speedup(evaluation.get("forward_seconds")),
        "num_clips": len(error.before),
        "num_noise_levels": error.before.shape[1],
        "num_seeds": len(error.seeds),
        "clips_improved": int(closer.sum()),
        "device": evaluation.get("device"),
    }


def sweep_report(sweep_dir: Path) -> Path:
    """Write sweep_dir/report/index.html and its Pareto plot from summary.json; return its path."""
    summary = sweep_dir / "summary.json"
    if not summary.is_file():
        raise Refusal(
            "sweep", sweep_dir, "a folder with summary.json", "run `gossamer sweep` first"
        )
    folder = sweep_dir / "report"
    _empty(folder)
    parts = sweep_sections(json.loads(summary.read_text()), sweep_dir, folder)
    name = sweep_dir.resolve().name
    return _write_page(folder, page.document(name, "Gossamer report: a sweep.", parts))


def _dense_headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    loss, samples = evaluation["flow_matching_loss"], evaluation.get("samples") or {}
    return {
        "train_loss": _mean(loss["train"]),
        "heldout_loss": _mean(loss["heldout"]),
        "psnr_to_real": _mean(samples.get("psnr_to_real")),
        "repeat_first_psnr": _mean(samples.get("repeat_first_psnr")),
        "device": evaluation.get("device"),
    }


def _speedup(seconds: dict[str, float] | None) -> float | None:
    """Return how many times faster than its teacher's a sampling step is."""
    return seconds["teacher"] / seconds["student"] if seconds else None


def _mean(values: list[float] | None) -> float | None:
    return float(np.mean(values)) if values else None


def _deviation(values: Array) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _empty(folder: Path) -> None:
    """Make the report's folder, without the pictures of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.gif")):
        old.unlink()


def _write_page(folder: Path, content: str) -> Path:
    path = folder / "index.html"
    write_atomic(path, content)
    return path
