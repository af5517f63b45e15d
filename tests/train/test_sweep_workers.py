"""Workers of one sweep that need the same data: one encodes it, the others wait for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.train.sweep import sweep


@pytest.mark.multi
@pytest.mark.slow
def test_workers_share_data_and_velocities_that_are_not_there_yet(lab: Any, tmp_path: Path) -> None:
    settings = {**lab.student_settings, "data.dir": tmp_path / "data", "stages": ["encode"]}
    settings |= {"name": "both", "teacher": "cached", "noise_draws": 2}
    overrides = [*lab.overrides(tmp_path, settings), "seed=0,1,2,3", "sweep.workers=2"]
    assert sweep(overrides) == 0
    jobs = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert [job["status"] for job in jobs] == ["finished"] * 4
    logs = [(tmp_path / "both" / job["run_dir"] / "log.txt").read_text() for job in jobs]
    assert sum("encoded {" in log for log in logs) == 1
    assert sum("velocities in" in log for log in logs) == 1
