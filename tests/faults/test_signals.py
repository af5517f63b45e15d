"""A cluster's SIGTERM reaches a process twice: from the cluster, and from the launcher."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

LONG_STEP = {"batch_size": 64, "grad_accumulation": 64, "checkpoint_every": 1, "steps": 50}


def told_twice(lab: Any, launcher: Any, runs: Path, inject: str = "") -> Any:
    """Send SIGTERM twice during the second step, and return how the job ended."""
    running = launcher.start(lab.student(runs, **LONG_STEP), inject=inject)
    running.when(lambda: (runs / "student" / "checkpoints" / "step-1").exists())
    time.sleep(0.1)
    running.send(signal.SIGTERM)
    time.sleep(0.2)
    running.send(signal.SIGTERM)
    return running.wait()


@pytest.mark.case("F6")
def test_sigterm_told_twice_at_once_is_one_request(lab: Any, launcher: Any, tmp_path: Path) -> None:
    done = told_twice(lab, launcher, tmp_path)
    assert done.code == 143 and "stopped by SIGTERM: step 2 of 50 is saved" in done.text, done.text
    assert lab.run(tmp_path).newest.name == "step-2"


@pytest.mark.case("F6", control=True)
def test_without_the_pause_the_second_one_would_cost_the_step(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    done = told_twice(lab, launcher, tmp_path, injection("no_echo"))
    assert done.code == -signal.SIGTERM and lab.run(tmp_path).newest.name == "step-1"
