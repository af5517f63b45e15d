"""The sections of a sweep's report: the Pareto plot and one row a job."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gossamer.train.reporting import page, plots, theme
from gossamer.train.reporting.errors import percent, plus_minus
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.run import Array

RESULTS = ("status", "measured sparsity", "before", "after", "reduction", "time")


@dataclass(frozen=True)
class Gain:
    """What sparsity buys: its name, its axis, and the metrics that hold it before and after."""

    name: str
    label: str
    before: str
    after: str


SPARSITY = Gain(
    "sparsity",
    "measured sparsity (share of token pairs not computed exactly)",
    "measured_sparsity_before",
    "measured_sparsity",
)
SPEED = Gain("speed", "sampling step, times faster than dense", "step_speedup", "step_speedup")
MAX_LABEL = 28  # characters beside a point


def sweep_sections(jobs: list[dict[str, Any]], sweep_dir: Path, folder: Path) -> list[Html]:
    """Return the page's sections and write the Pareto plots into folder."""
    swept = _varying(jobs)
    fronts = [_pareto_section(jobs, swept, folder / "pareto.png", SPARSITY)]
    if any((job.get("metrics") or {}).get(SPEED.after) is not None for job in jobs):
        fronts.append(_pareto_section(jobs, swept, folder / "pareto-speed.png", SPEED))
    return [*fronts, _table_section(jobs, swept, sweep_dir, folder)]


def pareto_front(sparsity: Array, error: Array) -> list[int]:
    """Return the jobs that no other beats in both sparsity and error, by rising sparsity."""
    order = np.lexsort((error, -sparsity))  # most sparse first, of equals the better
    front, lowest = [], np.inf
    for job in order:
        if error[job] < lowest:
            front.append(int(job))
            lowest = error[job]
    return front[::-1]


def _pareto_section(jobs: list[dict[str, Any]], swept: list[str], path: Path, gain: Gain) -> Html:
    title = f"Error against {gain.name}"
    needed = (gain.before, gain.after, "error_before", "error_after")
    shown = [
        (number, job)
        for number, job in enumerate(jobs, 1)
        if all((job.get("metrics") or {}).get(key) is not None for key in needed)
    ]
    if not shown:
        text = f"No job has both a {gain.name} and a velocity error, so there is no plot."
        return page.section(title, page.paragraph(text))
    after = _column(shown, gain.after), _column(shown, "error_after")
    before = _column(shown, gain.before), _column(shown, "error_before")
    front = pareto_front(*after)
    on_front = after[0][front], after[1][front]
    labels = [_label(number, job, swept) for number, job in shown]
    theme.write(
        path,
        lambda colours: plots.pareto(colours, before, after, on_front, labels, gain=gain.label),
    )
    names = ", ".join(f"#{shown[index][0]}" for index in front)
    text = f"On the Pareto front (no other job is better in both): {names}."
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
        page.paragraph(f"#{number} {job['status']}: {job.get('error') or 'no reason recorded'}")
        for number, job in enumerate(jobs, 1)
        if job["status"] == "failed" or job.get("error")
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
