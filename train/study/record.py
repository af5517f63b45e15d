"""What a study keeps of each job: one line of JSON, small enough to carry hundreds home."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gossamer.train.config import fingerprint
from gossamer.train.refusal import Refusal
from gossamer.train.report import headline
from gossamer.train.reporting.run import Run
from gossamer.train.run_dir import FREE_KEYS, PLACE_KEYS, RESULT
from gossamer.train.trackers import MetricsLog

DIGITS = 5
# Of the evaluation; what is left out is large and can be measured again.
KEPT = (
    *("trained", "sparsity", "velocity_error", "heldout_loss", "flow_matching_loss", "layers"),
    *("density", "recall", "forward_seconds", "floor", "noise_levels", "clips", "device"),
)
SETTINGS = (
    *(
        "sparsity",
        "seed",
        "steps",
        "batch_size",
        "optimizer.lr",
        "loss._target_",
        "layout._target_",
    ),
    *("estimator._target_", "policy._target_", "allocation._target_", "compensation._target_"),
    *("training_data.clips", "training_data.dir", "model.path", "evaluation.sample_steps"),
)


MADE_WITH = {"mixed_precision": "precision", "weights": "model's weights"}  # beside the config


def differing(kept: Mapping[str, Any], made_with: Mapping[str, str]) -> list[str]:
    """Return the keys of MADE_WITH that differ; one that is not kept, as before, fits any."""
    return [key for key, value in made_with.items() if kept.get(key, value) != value]


@dataclass(frozen=True)
class Results:
    """The lines of a .jsonl file, one for each job."""

    path: Path

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Return all whole lines; of one job, made with the same, the last."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            found[row["fingerprint"], *(row.get(key) for key in MADE_WITH)] = row
        return list(found.values())

    @staticmethod
    def identity(cfg: DictConfig) -> str:
        """Return what tells a job from others: a hash of all that decides what it finds.

        Compiled code finds the same but for rounding.
        """
        free = (*PLACE_KEYS, *FREE_KEYS, "compile", "compile_tuned")
        return fingerprint(cfg, ["stages", *(key for key in map(str, cfg) if key not in free)])

    def metrics_of(self, cfg: DictConfig, made_with: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the headline figures of a job that is in the file, or None."""
        own = self.identity(cfg)
        lines = [row for row in self.lines if not differing(row, made_with)]
        return next((row["metrics"] for row in lines if row["fingerprint"] == own), None)

    def add(
        self,
        job: str,
        overrides: Mapping[str, Any],
        cfg: DictConfig,
        seconds: float | None,
        *,
        sharing: int,
    ) -> None:
        """Append the line of a finished job; `sharing` jobs ran on its device at the same time."""
        row = {
            "job": job,
            "overrides": dict(overrides),
            "fingerprint": self.identity(cfg),
            "settings": {key: OmegaConf.select(cfg, key) for key in SETTINGS},
            "seconds": seconds,
            "sharing": sharing,
            **record(Path(cfg.run_dir)),
        }
        text = json.dumps(_plain(row), separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + text + "\n")
        self.lines.append(row)

    def required(self) -> list[dict[str, Any]]:
        """Return the lines; Refusal where there are none, or some that are no one study."""
        if not self.lines:
            raise Refusal(
                "results",
                self.path,
                "a file of `gossamer sweep sweep.results=FILE`",
                "run the study first",
            )
        for key, name in MADE_WITH.items():
            there = sorted({row[key] for row in self.lines if key in row})
            if len(there) > 1:
                allowed = f"lines of one {name} (there: {', '.join(there)})"
                raise Refusal("results", self.path, allowed, "give each sweep.results of its own")
        return self.lines


def record(run_dir: Path) -> dict[str, Any]:
    """Return what a finished run found, rounded: figures, errors by clip, curve and cost."""
    run = Run.read(run_dir)
    found = {key: run.evaluation[key] for key in KEPT if key in run.evaluation}
    quality = (run.evaluation.get("samples") or {}).get("quality", {})
    calibration = run.calibration or {}
    result = json.loads((run_dir / RESULT).read_text("utf-8"))
    return {
        **{key: result[key] for key in MADE_WITH},
        "metrics": headline(run.evaluation),
        **found,
        "quality": quality,
        "evaluation_seconds": run.evaluation.get("seconds"),
        "calibration": {
            key: calibration.get(key) for key in ("k", "p", "layout_choice", "seconds", "clips")
        },
        "training": training(run_dir / "metrics.jsonl"),
    }


def training(metrics: Path) -> dict[str, Any]:
    """Return curve [[step, seconds of training until then, error]], step time, loss, memory."""
    rows = {row["step"]: row for row in MetricsLog(metrics).rows()}
    if not rows:
        return {}
    curve, spent = [], 0.0
    for step in sorted(rows):
        spent += rows[step].get("step_seconds", 0.0)
        if "heldout_error" in rows[step]:
            curve.append([step, spent, rows[step]["heldout_error"]])
    steps = [row for step, row in sorted(rows.items()) if step > 0]
    if not steps:
        return {"curve": curve}
    losses = [row["loss"] for row in steps[-20:] if math.isfinite(row["loss"])]
    found = {
        "curve": curve,
        "steps": len(steps),
        "seconds": spent,
        "step_seconds": median(row["step_seconds"] for row in steps),
        "data_seconds": median(row["data_seconds"] for row in steps),
        "density": [steps[0]["density"], steps[-1]["density"]],
        "last_loss": fmean(losses) if losses else math.nan,
    }
    memory = [row["peak_memory_gib"] for row in steps if "peak_memory_gib" in row]
    return found | ({"peak_memory_gib": max(memory)} if memory else {})


def _plain(value: Any) -> Any:
    """Return the value with numbers of few digits and None for NaN, for a small file."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
