"""Processes that die, hang, fail or disagree never leave the others waiting."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gossamer
from gossamer.train import checkpoint
from gossamer.train.refusal import Refusal

ROOT = Path(gossamer.__file__).parents[1]
pytestmark = pytest.mark.multi

STEPS = 12
SETTINGS = {"steps": STEPS, "checkpoint_every": 4, "ema": 0.9}
SECONDS = 60


def rows(runs: Path) -> list[dict[str, Any]]:
    metrics = runs / "student" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.open()] if metrics.is_file() else []


def all_end(jobs: list[Any]) -> list[Any]:
    """Wait for jobs; those still there after SECONDS are killed, and that is an AssertionError."""
    end = time.monotonic() + SECONDS
    while not all(map(ended, jobs)) and time.monotonic() < end:
        time.sleep(0.02)
    late = [job.kill().text for job in jobs if not ended(job)]
    assert not late, late
    return [job.wait() for job in jobs]


def ended(job: Any) -> bool:
    """Tell whether a job's process, not yet waited for, has ended."""
    return Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def unbroken(lab: Any, launcher: Any, made_once: Any) -> Any:
    """The run of two processes that nothing disturbs."""

    def fill(runs: Path) -> None:
        done = launcher.ranks(lab.student(runs, **SETTINGS))
        assert [one.code for one in done] == [0, 0], done[0].text + done[1].text

    return lab.run(made_once("unbroken-ranks", fill))


@pytest.mark.case("R1")
def test_a_killed_process_ends_all_and_the_run_goes_on_bit_for_bit(
    rounds: Any, unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    chance = random.Random(0)
    for number in rounds(2, 20):
        overrides, runs = lab.student(tmp_path / str(number), **SETTINGS), tmp_path / str(number)
        if number % 2:  # in a save
            point = chance.choice(["after-dir", "before-manifest", "after-rename", "after-prune"])
            jobs = launcher.start_ranks(overrides, fault=(2, point))
        else:  # in a step
            jobs = launcher.start_ranks(overrides)
            row = chance.randrange(1, STEPS - 4)
            jobs[0].when(lambda runs=runs, row=row: len(rows(runs)) >= row)
            jobs[chance.randrange(2)].send(signal.SIGKILL)
        codes = [one.code for one in all_end(jobs)]
        assert -signal.SIGKILL in codes and all(codes)
        done = launcher.ranks(overrides)
        assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
        assert lab.run(runs).losses == unbroken.losses
        assert lab.run(runs).weights == unbroken.weights


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SAVING = {**SETTINGS, "steps": 6, "checkpoint_every": 1}


@pytest.mark.case("F2", "F3", "F4", "R1")
def test_a_sharded_run_survives_a_kill_a_flipped_bit_and_a_full_disk_of_process_1(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    overrides, checkpoints = lab.student(broken, **SAVING), broken / "student" / "checkpoints"
    inject = injection("process_1_dies_in_its_third_save")
    jobs = launcher.start_ranks(overrides, launch=FSDP, inject=inject)
    first, second = all_end(jobs)
    assert first.code and second.code == -signal.SIGKILL
    assert {p.name for p in checkpoints.iterdir()} == {"step-1", "step-2", ".step-3.tmp"}
    shard = checkpoints / "step-2" / "ema-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    inject = injection("disk_of_process_1_is_full_once")
    done = launcher.ranks(overrides, launch=FSDP, inject=inject)
    assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
    assert f"step-2 is damaged ({shard.name})" in done[0].text
    assert "at step 1 of 6" in done[0].text
    said = "step-2 not saved, the older ones stay: process 1: [Errno 28] No space left"
    assert done[0].text.count("not saved") == 1 and said in done[0].text
    done = launcher.ranks(lab.student(whole, **SAVING), launch=FSDP)
    assert [one.code for one in done] == [0, 0]
    assert lab.run(broken).losses == lab.run(whole).losses
    assert lab.run(broken).weights == lab.run(whole).weights


@pytest.mark.case("F3", control=True)
def test_a_full_disk_that_process_1_keeps_to_itself_is_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    inject = injection("only_its_own_disk_counts")
    overrides = lab.student(tmp_path, **{**SAVING, "steps": 1})
    first, _ = launcher.ranks(overrides, launch=FSDP, inject=inject)
    checkpoints = tmp_path / "student" / "checkpoints"
    assert first.code == 0 and (checkpoints / "step-1").is_dir()
    with pytest.raises(Refusal, match="rows once"):
        checkpoint.load(checkpoints / "step-1")


@pytest.mark.case("R1")
def test_one_of_four_killed_ends_all(rounds: Any, lab: Any, launcher: Any, tmp_path: Path) -> None:
    for number in rounds(0, 5):
        jobs = launcher.start_ranks(lab.student(tmp_path / str(number), **SETTINGS), processes=4)
        jobs[0].when(lambda number=number: len(rows(tmp_path / str(number))) >= 2)
        jobs[number % 4].send(signal.SIGKILL)
        assert all(one.code for one in all_end(jobs))


@pytest.mark.case("R1")
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_process_that_says_nothing_more_ends_all_and_is_named(
    stuck: int, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    """As with NCCL, whose calls do not fail when a process is gone: the other waits in one."""
    jobs = launcher.start_ranks(
        lab.student(tmp_path, steps=5000), inject=injection("impatient_pulse")
    )
    jobs[0].when(lambda: len(rows(tmp_path)) >= 2)
    jobs[stuck].send(signal.SIGSTOP)
    (done,) = all_end([jobs[1 - stuck]])
    jobs[stuck].kill()
    assert done.code == 1
    assert f"error: process {stuck} has not been heard of for 3 s: ending process" in done.text


@pytest.mark.case("R1", control=True)
def test_without_the_pulse_a_silent_process_is_waited_for(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    jobs = launcher.start_ranks(lab.student(tmp_path, steps=5000), inject=injection("no_pulse"))
    jobs[0].when(lambda: len(rows(tmp_path)) >= 2)
    jobs[1].send(signal.SIGSTOP)
    time.sleep(5)
    assert not ended(jobs[0])
    assert [job.kill().code for job in jobs] == [-signal.SIGKILL] * 2


@pytest.mark.case("R2")
def test_a_process_that_fails_ends_all_and_is_named(
    rounds: Any, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    for number in rounds(1, 5):
        overrides = lab.student(tmp_path / str(number), **SETTINGS)
        done = all_end(launcher.start_ranks(overrides, inject=injection("failing_batch")))
        assert all(one.code for one in done)
        assert "process 1 of 2 failed: ValueError a bad batch" in done[1].text


DRIVER = """
import os, sys, time
from pathlib import Path
import gossamer
from gossamer.train import checkpoint
from gossamer.train.cli import main
marker = Path(sys.argv[1])
if os.environ["RANK"] == sys.argv[2] and not marker.exists():
    import gossamer.train.losses as losses
    compute, calls = losses.VelocityDistillation.__call__, iter(range(1, 100))
    def die(self, *args):
        if next(calls) == 7:
            marker.touch()
            os.kill(os.getpid(), 9)
        return compute(self, *args)
    losses.VelocityDistillation.__call__ = die
sys.exit(main(["train", *sys.argv[3:]]))
"""


@pytest.fixture
def accelerate(lab: Any, tmp_path: Path) -> Any:
    """Return a function that starts `accelerate launch` with its options on two processes."""

    def start(*words: object) -> subprocess.Popen[str]:
        options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
        command += ["--dynamo_backend", "no", "--main_process_port", "0", *map(str, words)]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(lab.source), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.slow
@pytest.mark.case("R3")
def test_a_restart_by_the_launcher_ends_with_the_losses_of_the_unbroken_run(
    rounds: Any, unbroken: Any, lab: Any, accelerate: Any, tmp_path: Path
) -> None:
    numbers = list(rounds(0, 1))
    if not numbers:
        pytest.skip("in full counts only")
    (tmp_path / "driver.py").write_text(DRIVER)
    words = ["--max_restarts", "3", tmp_path / "driver.py", tmp_path / "died", "1"]
    job = accelerate(*words, *lab.student(tmp_path, **SETTINGS))
    text = job.communicate(timeout=300)[0]
    assert job.returncode == 0 and (tmp_path / "died").exists(), text
    assert lab.run(tmp_path).losses == unbroken.losses
    assert lab.run(tmp_path).weights == unbroken.weights


@pytest.mark.slow
@pytest.mark.case("F6")
def test_sigterm_to_the_launcher_and_every_process_saves_once(
    rounds: Any, lab: Any, accelerate: Any, tmp_path: Path
) -> None:
    """As a cluster does it: the launcher passes it on to processes that were told already."""
    numbers = list(rounds(0, 1))
    if not numbers:
        pytest.skip("in full counts only")
    job = accelerate("-m", "gossamer.train", *lab.student(tmp_path, **{**SETTINGS, "steps": 5000}))
    end = time.monotonic() + 120
    while len(rows(tmp_path)) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for pid in [*children, job.pid]:
        os.kill(int(pid), signal.SIGTERM)
    text = job.communicate(timeout=60)[0]
    assert job.returncode and "stopped by SIGTERM" in text, text
    run = lab.run(tmp_path)
    assert run.newest.name == f"step-{len(run.losses)}"
    assert checkpoint.latest(run.folder / "checkpoints") == run.newest


@pytest.mark.case("R4")
def test_processes_with_different_data_are_refused(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path)
    done = all_end(launcher.start_ranks(overrides, inject=injection("other_data_in_process_1")))
    assert [one.code for one in done] == [2, 2]
    assert "allowed is the same for all processes" in done[0].errors[0]


@pytest.mark.case("R4", control=True)
def test_without_the_comparison_they_would_train(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path)
    done = all_end(launcher.start_ranks(overrides, inject=injection("other_data_unchecked")))
    assert [one.code for one in done] == [0, 0]


@pytest.mark.case("R6")
def test_the_masks_and_losses_do_not_depend_on_the_number_of_processes(
    rounds: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    for number in rounds(1, 2):
        processes = 2 ** (number + 1)
        alone, runs = tmp_path / f"{processes} parts", tmp_path / str(processes)
        # one process that takes the clips in the same parts: other sums round otherwise
        parts = lab.student(alone, grad_accumulation=processes, calibration__path=None)
        assert launcher.run(parts).code == 0
        jobs = launcher.start_ranks(lab.student(runs, calibration__path=None), processes=processes)
        assert [job.wait().code for job in jobs] == [0] * processes
        shared = rows(runs)
        for name in ("loss", "grad_norm"):
            ours, single = ([row[name] for row in some] for some in (shared, rows(alone)))
            np.testing.assert_allclose(ours, single, rtol=1e-5)


def nan_row(found: list[dict[str, Any]]) -> None:
    """Require that step 3 alone was left out."""
    assert [row["step"] for row in found if row["loss"] is None] == [3]
    assert [row["skipped"] for row in found] == [0, 0] + [1] * (STEPS - 2)


@pytest.mark.case("R7")
def test_nan_in_one_process_leaves_the_step_out_in_all(
    rounds: Any, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    for number in rounds(1, 20):
        runs = tmp_path / str(number)
        jobs = launcher.start_ranks(
            lab.student(runs, **SETTINGS), inject=injection("nan_in_process_1")
        )
        done = all_end(jobs)
        assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
        nan_row(rows(runs))
        assert "step 3 is left out in all processes: loss=nan (process 1, clips " in done[0].text


@pytest.mark.case("R7", control=True)
def test_processes_that_do_not_agree_on_nan_are_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    inject = injection("nan_in_process_1_and_no_agreement")
    all_end(launcher.start_ranks(lab.student(tmp_path, **SETTINGS), inject=inject))
    with pytest.raises(AssertionError):
        nan_row(rows(tmp_path))


@pytest.mark.case("C8")
def test_a_process_that_never_comes_is_not_waited_for_for_ever() -> None:
    script = (
        "import time; from gossamer.train.pulse import meeting\nwith meeting(0.1): time.sleep(50)"
    )
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **here, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert "num_processes=2: allowed is as many as were started" in done.stderr
