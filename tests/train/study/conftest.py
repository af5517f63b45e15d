"""Made-up results of a study, whose truth is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gossamer.train.study.data import Study

SHOTS = ["a", "a", "a", "b", "c", "d", "e", "f"]
LEVELS = [0.9, 0.5, 0.1]
STEPS = [0, 10, 20, 100]


def _line(
    arm: str, sparsity: float, seed: int, *, error: float, start: float = 0.3, **changes: Any
) -> dict[str, Any]:
    """Return a result whose error is about `error` in every clip, with the clips' own spread."""
    spread = 1 + 0.2 * np.sin(np.arange(len(SHOTS)))[:, None] * np.ones(len(LEVELS))
    chance = np.random.default_rng([seed, *arm.encode()])
    noise = 1 + 0.01 * chance.normal(size=spread.shape)
    curve = [
        [step, 0.1 * step, start + (error - start) * min(1, i)] for i, step in enumerate(STEPS)
    ]
    psnr = [20.0 + i for i in range(4)]
    dense = sparsity == 0
    found: dict[str, Any] = {
        "job": f"{arm} {sparsity} {seed}",
        "overrides": {"arm": arm},
        "fingerprint": f"{arm} {sparsity} {seed}",
        "settings": {"sparsity": sparsity, "seed": seed, "steps": 100, "batch_size": 4,
                     "evaluation.sample_steps": 30},
        "seconds": 40.0,
        "sharing": 1,
        "metrics": {},
        "trained": not arm.startswith(("A", "T")),
        "velocity_error": {
            "before": (start * spread).tolist(),
            "after": {str(seed): (error * spread * noise).tolist()},
        },
        "forward_seconds": {"student": 0.02} | ({} if dense else {"teacher": 0.03}),
        "noise_levels": LEVELS,
        "clips": [{"index": i, "clip_id": f"c{i}", "shot": s} for i, s in enumerate(SHOTS)],
        "device": "a GPU",
        "quality": {
            "real/teacher": {"psnr": psnr},
            "real/first": {"psnr": [x - 2 for x in psnr]},
            "real/after": {"psnr": [x - error for x in psnr]},
            "teacher/after": {"psnr": [30.0 - 10 * error] * 4},
        },
        "training": {"curve": curve, "step_seconds": 0.1},
    }  # fmt: skip
    if not dense:
        found["sparsity"] = {"measured_after": sparsity}
    return {**found, **changes}


def _study(**errors: float) -> Study:
    named = {arm.replace("_", "-"): error for arm, error in errors.items()}
    return Study.of([
        _line(arm, s, seed, error=error)
        for arm, error in named.items() for s in (0.9, 0.95) for seed in (0, 1, 2)
    ])  # fmt: skip


@pytest.fixture
def line() -> Callable[..., dict[str, Any]]:
    """A function: arm, sparsity, seed, error ... -> a line of results."""
    return _line


@pytest.fixture
def study() -> Callable[..., Study]:
    """A function: error of each arm -> a study at 90 and 95 % with three seeds."""
    return _study
