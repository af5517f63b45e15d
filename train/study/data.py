"""The results of a study in arrays: one cell for each arm and sparsity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.train.refusal import Refusal

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one sparsity, one a seed; a dense arm's sparsity is 0."""

    arm: str
    sparsity: float
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def trained(self) -> bool:
        return bool(self.rows[0]["trained"])

    @property
    def seeds(self) -> list[int]:
        return [row["settings"]["seed"] for row in self.rows]

    @property
    def shots(self) -> list[str]:
        return [clip["shot"] for clip in self.rows[0]["clips"]]

    @cached_property
    def after(self) -> Array | None:
        """Return the relative velocity error [seed, clip, noise level], None without a teacher."""
        found = [row["velocity_error"]["after"] for row in self.rows if "velocity_error" in row]
        return np.array([next(iter(after.values())) for after in found]) if found else None

    @cached_property
    def before(self) -> Array | None:
        """Return the same of the untrained start."""
        found = [row.get("velocity_error", {}).get("before") for row in self.rows]
        return np.array(found) if all(found) else None

    def quality(self, pair: str, measure: str) -> Array | None:
        """Return a measure of sampled videos [seed, clip]; pair is e.g. teacher/after.

        Of the seeds that have it; None without one.
        """
        found = [row["quality"].get(pair, {}).get(measure) for row in self.rows]
        return np.array([each for each in found if each], dtype=np.float64) if any(found) else None

    @property
    def sampled_shots(self) -> list[str]:
        """Return the shots of the sampled clips, which are spread evenly over all."""
        pairs = self.rows[0]["quality"].values()
        count = max((len(measures["psnr"]) for measures in pairs), default=0)
        return [self.shots[int((i + 0.5) * len(self.shots) / count)] for i in range(count)]

    @property
    def density(self) -> float | None:
        """Return the density realised on the held-out clips after training, mean over seeds."""
        found = [row["sparsity"]["measured_after"] for row in self.rows if "sparsity" in row]
        return 1 - float(np.mean(found)) if found else None

    @cached_property
    def alone(self) -> list[Mapping[str, Any]]:
        """Return the runs that had their device for themselves: only their times count."""
        return [row for row in self.rows if row["sharing"] == 1]

    @property
    def speedup(self) -> float | None:
        """Return how many times faster a sampling step is than the dense teacher's, in this run."""
        return self.faster("")

    def faster(self, part: str) -> float | None:
        """Return the same of a part of the step, "_attention" or all of it, ""."""
        teacher, student = f"teacher{part}", f"student{part}"
        seconds = [row["forward_seconds"] for row in self.alone]
        if not seconds or not all(teacher in each for each in seconds):
            return None
        return float(np.mean([each[teacher] / each[student] for each in seconds]))

    def milliseconds(self, name: str) -> float | None:
        """Return a time of a sampling step of one batch (student, student_attention ...)."""
        return _mean([row["forward_seconds"].get(name) for row in self.alone], 1e3)

    @property
    def curve(self) -> Array | None:
        """Return step, seconds of training (NaN if unknown), error [point, 3], mean over seeds."""
        found = [row["training"].get("curve") for row in self.rows]
        if not all(found) or len({len(curve) for curve in found}) > 1:
            return None
        curve: Array = np.array(found, dtype=np.float64).mean(0)
        times = [row["training"]["curve"] for row in self.alone]
        curve[:, 1] = np.array(times)[:, :, 1].mean(0) if times else np.nan
        return curve

    @property
    def step_seconds(self) -> float | None:
        return _mean([row["training"].get("step_seconds") for row in self.alone])

    @property
    def peak_memory(self) -> float | None:
        """Return the most memory of the training in GiB."""
        return _mean([row["training"].get("peak_memory_gib") for row in self.rows])


@dataclass(frozen=True)
class Study:
    """All cells of a study; only lines of the same clips, steps and noise levels compare."""

    cells: dict[tuple[str, float], Cell]

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> "Study":
        """Sort the lines of a results file; Refusal where their clips differ."""
        for key in ("clips", "noise_levels"):
            if any(line[key] != lines[0][key] for line in lines):
                allowed = f"results with the same {key}"
                raise Refusal("results", lines[0]["job"], allowed, "keep one study in one file")
        grouped: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
        for line in lines:
            key_of = str(line["overrides"]["arm"]), float(line["settings"]["sparsity"])
            grouped.setdefault(key_of, []).append(line)
        cells = {}
        for (arm, sparsity), rows in grouped.items():
            ordered = sorted(rows, key=lambda row: row["settings"]["seed"])
            cells[arm, sparsity] = Cell(arm, sparsity, ordered)
        return cls(cells)

    def get(self, arm: str, sparsity: float) -> Cell | None:
        """Return an arm's cell; a dense arm's whatever the sparsity."""
        return self.cells.get((arm, sparsity)) or self.cells.get((arm, 0.0))

    @property
    def arms(self) -> list[str]:
        return sorted({arm for arm, _ in self.cells}, key=_place)

    @property
    def sparsities(self) -> list[float]:
        return sorted({sparsity for _, sparsity in self.cells if sparsity > 0})

    @property
    def any_line(self) -> Mapping[str, Any]:
        return next(iter(self.cells.values())).rows[0]


def _mean(found: Sequence[float | None], times: float = 1.0) -> float | None:
    known = [x for x in found if x is not None]
    return times * float(np.mean(known)) if known and len(known) == len(found) else None


def _place(arm: str) -> tuple[str, int, str]:
    return arm[0], len(arm), arm
