"""What is kept of a job's training, whatever its metrics went through."""

from pathlib import Path

import pytest

from gossamer.train.study.record import training
from gossamer.train.trackers import MetricsLog

TIMES = {"step_seconds": 2.0, "data_seconds": 0.5, "density": 0.25}


def test_steps_without_a_finite_loss_and_torn_lines_do_not_count(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 0, "heldout_error": 0.5})
    for step, loss in enumerate((3.0, float("nan"), 1.0), start=1):
        log.append({"step": step, "loss": loss, **TIMES})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    found = training(tmp_path / "metrics.jsonl")
    assert found["steps"] == 3 and found["last_loss"] == 2.0
    assert found["curve"] == [[0, 0.0, 0.5]] and found["seconds"] == 6.0


def test_a_run_without_training_has_none_and_one_of_no_finite_loss_no_last_loss(
    tmp_path: Path,
) -> None:
    assert training(tmp_path / "metrics.jsonl") == {}
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "loss": float("inf"), **TIMES})
    assert training(tmp_path / "metrics.jsonl")["last_loss"] == pytest.approx(
        float("nan"), nan_ok=True
    )
