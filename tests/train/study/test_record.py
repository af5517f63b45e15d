"""What is kept of a job: of its training, whatever its metrics went through; in its precision."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.train.config import compose
from gossamer.train.refusal import Refusal
from gossamer.train.study.record import Results, training
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


@pytest.mark.parametrize(
    ("key", "said"), [("mixed_precision", "precision"), ("weights", "model's weights")]
)
def test_a_job_is_known_by_the_precision_and_the_weights_that_it_ran_with(
    key: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, path = compose([]), tmp_path / "found.jsonl"
    one, other = ({"mixed_precision": "no", "weights": "0", key: value} for value in ("a", "b"))

    def add(made_with: dict[str, str], error: float) -> None:
        found: dict[str, Any] = {**made_with, "metrics": {"error_after": error}}
        monkeypatch.setattr("gossamer.train.study.record.record", lambda _: found)
        Results(path).add("a", {}, cfg, 1.0, sharing=1)

    add(one, 0.5)
    assert Results(path).metrics_of(cfg, other) is None
    assert Results(path).required()
    add(other, 0.6)
    assert Results(path).metrics_of(cfg, one) == {"error_after": 0.5}
    assert Results(path).metrics_of(cfg, other) == {"error_after": 0.6}
    with pytest.raises(Refusal, match=rf"lines of one {said} \(there: a, b\)"):
        Results(path).required()
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({name: line[name] for name in line if name != key}) + "\n")
    assert Results(path).metrics_of(cfg, other) == {"error_after": 0.5}, "of an earlier version"
