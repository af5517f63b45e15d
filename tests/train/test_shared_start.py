"""What jobs of a sweep leave each other of the untrained model: the same figures, measured once."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.train import shared_file
from gossamer.train.evaluation import EVALUATION, MASKS, evaluate_stage
from gossamer.train.heldout import Heldout
from gossamer.train.job import VELOCITIES
from gossamer.train.run_dir import STARTS
from gossamer.train.stages import calibrate_stage, train_stage

SETTINGS: dict[str, Any] = {
    "calibration__seed": 0,
    "calibration__path": None,
    "steps": 2,
    "evaluation__sample_clips": 1,
}
TIMES = ("seconds", "forward_seconds", "made_for")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the sparse models that are measured."""
    own, names = Heldout.sparse, []

    def sparse(self: Heldout, name: str, make: Any) -> Any:
        names.append(name)
        return own(self, name, make)

    monkeypatch.setattr(Heldout, "sparse", sparse)
    return names


def evaluation(make_job: Any, name: str, *, sweep: str = "sweep", **settings: Any) -> Any:
    """Run a job of a sweep, in a process of its own; return its evaluation and its masks."""
    job = make_job(name=f"{sweep}/{name}", **{**SETTINGS, **settings})
    job.kept = {VELOCITIES: None}
    calibrate_stage(job)
    if job.trains:
        train_stage(job)
    evaluate_stage(job)
    found = json.loads((job.run_dir / EVALUATION).read_text())
    masks = {name: x.tolist() for name, x in np.load(job.run_dir / MASKS).items()}
    return {key: value for key, value in found.items() if key not in TIMES}, masks


def test_a_second_seed_finds_the_start_of_the_first(make_job: Any, measured: list[str]) -> None:
    alone = evaluation(make_job, "alone", sweep="another", seed=1)
    evaluation(make_job, "first", seed=0)
    assert measured == ["before", "after"] * 2
    assert evaluation(make_job, "second", seed=1) == alone
    assert measured == [*["before", "after"] * 2, "after"]


def test_an_untrained_arm_takes_its_own_times(make_job: Any, measured: list[str]) -> None:
    trained, _ = evaluation(make_job, "trained")
    found, _ = evaluation(make_job, "untrained", stages="[calibrate,evaluate]")
    assert measured == ["before", "after", "before"]
    assert found["velocity_error"]["before"] == trained["velocity_error"]["before"]


def test_a_start_that_cannot_be_read_is_measured_anew(
    make_job: Any, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluation(make_job, "first")
    (file,) = (make_job(name="sweep/first").run_dir.parent / STARTS).iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert evaluation(make_job, "second") == first
    assert measured == ["before", "after"] * 2
    assert "cannot be read, and is made anew" in caplog.text
    assert evaluation(make_job, "third") == first
    assert measured == [*["before", "after"] * 2, "after"]


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5},
        {"compensation": "drop"},
        {"evaluation__clips": 3},
        {"allocation": "one_mass", "evaluation__match_density": True},
        {"calibration__seed": 1},
    ],
)
def test_another_start_is_measured(
    settings: dict[str, Any], make_job: Any, measured: list[str]
) -> None:
    evaluation(make_job, "first")
    evaluation(make_job, "other", **settings)
    assert measured == ["before", "after"] * 2


def test_a_full_disk_ends_the_leaving_not_the_job(
    make_job: Any,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def write(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_file, "write_atomic", write)
    with caplog.at_level(logging.WARNING):
        first = evaluation(make_job, "first")
        assert evaluation(make_job, "second", seed=1)[0]["velocity_error"]["before"]
    assert measured == ["before", "after"] * 2 and first
    assert "is not left to other jobs: [Errno 28] No space left" in caplog.text
