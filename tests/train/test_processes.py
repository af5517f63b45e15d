"""Two processes on the CPU (gloo) are one run: the same losses, one folder, one end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.multi


def assert_same(run: Any, alone: Any) -> None:
    """Require the losses within 1e-5 of each other, relative and absolute, and close weights."""
    mine, theirs = np.array(run.losses), np.array(alone.losses)
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=0)
    ours, single = (load_file(r.newest / "model.safetensors") for r in (run, alone))
    assert ours.keys() == single.keys()
    assert max(float((ours[n] - single[n]).abs().max()) for n in ours) < 1e-4


@pytest.mark.case("R5", "R6")
def test_accelerate_launch_of_two_processes_gives_the_losses_of_one(
    unbroken: Any, lab: Any, tmp_path: Path
) -> None:
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "gossamer.train"]
    done = subprocess.run(
        [*command, *lab.student(tmp_path / "runs", calibration__path=None)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(lab.source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same(lab.run(tmp_path / "runs"), unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # of both processes
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["student"]
    assert done.stderr.count("calibrated in") == 1


def test_accumulation_in_two_processes_gives_the_losses_of_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    # Parts of two clips: the CPU's products of a single clip round otherwise than those of more.
    # Sums in another order round otherwise too, and AdamW makes of that what its rate allows.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"batch_size": 8, "optimizer__lr": 1e-4}
    assert launcher.run(lab.student(whole, **settings)).code == 0
    overrides = lab.student(parts, **settings, grad_accumulation=2)
    assert [done.code for done in launcher.ranks(overrides)] == [0, 0]
    assert_same(lab.run(parts), lab.run(whole))


def test_single_clips_in_two_processes_give_the_losses_of_single_clips_in_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert launcher.run(lab.student(one, grad_accumulation=4)).code == 0
    overrides = lab.student(two, grad_accumulation=2)
    assert [done.code for done in launcher.ranks(overrides)] == [0, 0]
    assert_same(lab.run(two), lab.run(one))


@pytest.mark.case("F9", "R1")
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_in_another_number_of_processes(
    first: str, unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides, fault = lab.student(tmp_path), (1, "after-rename")
    if first == "one":
        assert launcher.run(overrides, fault=fault).code == -9
        done = launcher.ranks(overrides)
    else:
        killed, left = launcher.ranks(overrides, fault=fault)
        assert killed.code == -9 and left.code != 0  # and does not wait for ever
        done = [launcher.run(overrides)]
    assert all(one.code == 0 and "at step 4 of 8" in done[0].text for one in done)
    assert_same(lab.run(tmp_path), unbroken)


def test_a_refusal_of_the_first_process_ends_both_and_is_said_once(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    shutil.copytree(unbroken.folder, tmp_path / "student")
    first, second = launcher.ranks(lab.student(tmp_path, steps=9))
    assert first.code == second.code == 2
    assert len(first.errors) == 1 and "steps: 8 -> 9" in first.errors[0]
    assert "Traceback" not in first.text and second.text == ""


@pytest.mark.case("C8")
def test_a_batch_that_does_not_divide_is_refused_before_any_work(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    done = launcher.ranks(lab.student(tmp_path, batch_size=3))
    assert [one.code for one in done] == [2, 2]
    assert "set batch_size=4" in done[0].errors[0]
    assert not any(tmp_path.iterdir())
