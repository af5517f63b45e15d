"""The sections of a sweep's report: the Pareto plot and one row a job."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gossamer.train.reporting import page, plots, theme
from gossamer.train.reporting.errors import percent, plus_minus
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.run import Array

RESULTS = ("status", "measured sparsity", "before", "after", "reduction", "time")
MAX_LABEL = 28  # characters beside a point


def sweep_sections(jobs: list[dict[str, Any]], sweep_dir: Path, folder: Path) -> list[Html]:
    """Return the page's sections and write the Pareto plot into folder."""
    swept = _varying(jobs)
    return [_pareto_section(jobs, swept, folder), _table_section(jobs, swept, sweep_dir, folder)]


def pareto_front(sparsity: Array, error: Array) -> list[int]:
    """Return the jobs that no other beats in both sparsity and error, by rising sparsity."""
    order = np.lexsort((error, -sparsity))  # most sparse first, of equals the better
    front, lowest = [], np.inf
    for job in order:
        if error[job] < lowest:
            front.append(int(job))
            lowest = error[job]
    return front[::-1]


def _pareto_section(jobs: list[dict[str, Any]], swept: list[str], folder: Path) -> Html:
    title = "Error against sparsity"
    shown = [
        (number, job) for number, job in enumerate(jobs, 1) if _has_point(job.get("metrics") or {})
    ]
    if not shown:
        text = "No job has both a measured sparsity and a velocity error, so there is no plot."
        return page.section(title, page.paragraph(text))
    after = _column(shown, "measured_sparsity"), _column(shown, "error_after")
    before = _column(shown, "measured_sparsity_before"), _column(shown, "error_before")
    front = pareto_front(*after)
    on_front = after[0][front], after[1][front]
    labels = [_label(number, job, swept) for number, job in shown]
    path = theme.write(
        folder / "pareto.png",
        lambda colours: plots.pareto(colours, before, after, on_front, labels),
    )
    names = ", ".join(f"#{shown[index][0]}" for index in front)
    text = f"On the Pareto front (no other job is both sparser and closer to its teacher): {names}."
    return page.section(title, page.plot(path, title), page.paragraph(text))


def _table_section(
    jobs: list[dict[str, Any]], swept: list[str], sweep_dir: Path, folder: Path
) -> Html:
    rows = [
        (
            _linked(f"#{number}", job, sweep_dir, folder),
            *(_text(job["overrides"].get(key, "")) for key in swept),
            job["status"],
            *_figures(job.get("metrics") or {}),
            _duration(job.get("seconds")),
        )
        for number, job in enumerate(jobs, 1)
    ]
    caption = (
        "Sparsity is measured after distillation; before and after are relative velocity errors, "
        "± is the standard deviation over seeds. A skipped job was finished by an earlier call."
    )
    failures = [
        page.paragraph(f"#{number} failed: {job.get('error') or 'no reason recorded'}")
        for number, job in enumerate(jobs, 1)
        if job["status"] == "failed"
    ]
    done = sum(job["status"] in ("finished", "skipped") for job in jobs)
    title = f"Jobs: {done} of {len(jobs)} finished"
    return page.section(title, page.table(("job", *swept, *RESULTS), rows, caption), *failures)


def _varying(jobs: list[dict[str, Any]]) -> list[str]:
    """Return the overridden keys that differ between jobs, or all of them where none does."""
    keys = list(dict.fromkeys(key for job in jobs for key in job["overrides"]))
    differing = [key for key in keys if len({_text(job["overrides"].get(key)) for job in jobs}) > 1]
    return differing or keys


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _has_point(metrics: dict[str, Any]) -> bool:
    needed = ("measured_sparsity", "measured_sparsity_before", "error_before", "error_after")
    return all(metrics.get(name) is not None for name in needed)


def _column(shown: list[tuple[int, dict[str, Any]]], name: str) -> Array:
    return np.array([job["metrics"][name] for _, job in shown], dtype=np.float64)


def _label(number: int, job: dict[str, Any], swept: list[str]) -> str:
    """Return the job's number and its values, without the values where they are long."""
    values = ", ".join(_text(job["overrides"].get(key, "")) for key in swept)
    label = f"#{number}  {values}"
    return label if len(label) <= MAX_LABEL else f"#{number}"


def _figures(metrics: dict[str, Any]) -> tuple[str, str, str, str]:
    if not _has_point(metrics):
        return ("", "", "", "")
    return (
        percent(metrics["measured_sparsity"]),
        f"{metrics['error_before']:.4f}",
        plus_minus(metrics["error_after"], metrics.get("error_after_sd")),
        f"{metrics['reduction_percent']:.1f} %",
    )


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _linked(text: str, job: dict[str, Any], sweep_dir: Path, folder: Path) -> str:
    """Return the text, linked to the job's report where there is one."""
    target = sweep_dir / job["run_dir"] / "report" / "index.html"
    if not target.is_file():
        return text
    return page.link(text, quote(os.path.relpath(target.resolve(), folder.resolve())))
