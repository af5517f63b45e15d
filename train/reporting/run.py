"""What a report reads of a run: its evaluation, calibration, metrics and resolved config."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.train.refusal import Refusal
from gossamer.train.trackers import MetricsLog

Array = NDArray[np.float64]

METRICS = ("loss", "lr", "grad_norm", "density", "step_seconds", "data_seconds")
EVALUATE = "run `gossamer evaluate` for it first"


@dataclass(frozen=True, eq=False)
class VelocityError:
    """Relative velocity error of N held-out clips at T noise levels, after from R seeds."""

    before: Array  # [N, T]
    after: Array  # [R, N, T]
    seeds: tuple[str, ...]

    @classmethod
    def read(cls, evaluation: dict[str, Any]) -> "VelocityError":
        """Take the errors out of an evaluation; Refusal where the shapes do not fit."""
        error = evaluation["velocity_error"]
        seeds = tuple(sorted(error["after"], key=int))
        before = np.asarray(error["before"], dtype=np.float64)
        after = [np.asarray(error["after"][seed], dtype=np.float64) for seed in seeds]
        expected = (before.shape[0], len(evaluation["noise_levels"]))
        shapes = [before.shape, *(matrix.shape for matrix in after)]
        if not after or any(shape != expected for shape in shapes):
            raise Refusal(
                "evaluation.velocity_error",
                f"shapes {shapes}",
                f"{expected} (clips, noise levels) before and after for one seed or more",
                "run `gossamer evaluate` again",
            )
        return cls(before=before, after=np.stack(after), seeds=seeds)

    @property
    def seed_means(self) -> Array:
        """Return each seed's mean over clips and noise levels, [R]."""
        return self.after.mean((1, 2))


@dataclass(frozen=True, eq=False)
class Run:
    """The files of one run; a part that the run does not have is None or empty."""

    folder: Path
    evaluation: dict[str, Any]
    calibration: dict[str, Any] | None
    calibration_said: str | None
    curves: dict[str, dict[str, Array]]  # {seed label: {"step" and METRICS: [rows]}}
    config: str | None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read the run in this folder; Refusal where it was not evaluated."""
        if not folder.is_dir():
            raise Refusal("run", folder, "the folder of a run", "give the folder training wrote")
        evaluation = _read_json(folder / "evaluation" / "evaluation.json")
        if evaluation is None:
            raise Refusal("run", folder, "a run that holds evaluation/evaluation.json", EVALUATE)
        if not {"velocity_error", "flow_matching_loss"} & evaluation.keys():
            raise Refusal(
                "evaluation",
                sorted(evaluation),
                "one that holds velocity_error or flow_matching_loss",
                EVALUATE,
            )
        config, said = folder / "config.yaml", folder / "calibration" / "calibration.txt"
        return cls(
            folder=folder,
            evaluation=evaluation,
            calibration=_read_json(folder / "calibration" / "calibration.json"),
            calibration_said=said.read_text() if said.is_file() else None,
            curves=_read_curves(folder),
            config=config.read_text() if config.is_file() else None,
        )

    @property
    def is_dense(self) -> bool:
        """Say whether this run trained a dense teacher."""
        return "flow_matching_loss" in self.evaluation

    @property
    def report(self) -> Path:
        """Return the folder of the report."""
        return self.folder / "report"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise Refusal(path.name, path, f"a JSON file ({error})", "write it again") from error
    return content


def _read_curves(folder: Path) -> dict[str, dict[str, Array]]:
    repeats = sorted(
        folder.glob("repeats/seed-*/metrics.jsonl"),
        key=lambda path: int(path.parent.name.removeprefix("seed-")),
    )
    files = {_label(folder / "config.yaml"): folder / "metrics.jsonl"}
    files |= {path.parent.name.replace("-", " "): path for path in repeats}
    curves = {label: _columns(MetricsLog(path).rows()) for label, path in files.items()}
    return {label: columns for label, columns in curves.items() if len(columns["step"])}


def _label(config: Path) -> str:
    """Return `seed 0` where the config names the seed of the run's own training."""
    seed = re.search(r"^seed: *(\d+)", config.read_text(), re.M) if config.is_file() else None
    return f"seed {seed[1]}" if seed else "this run"


def _columns(rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Return the metrics by name; of a step that a resume repeated the last row counts."""
    # row 0 is the held-out error of the start alone
    by_step = {row["step"]: row for row in rows if row["step"] > 0}
    ordered = [by_step[step] for step in sorted(by_step)]
    return {
        name: np.array([row.get(name, math.nan) for row in ordered], dtype=np.float64)
        for name in ("step", *METRICS)
    }
