"""No network, odd paths, jumping clocks, too little memory: the run goes on or says what to do."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ALL = ["encode", "calibrate", "train", "evaluate", "export", "report"]


@pytest.mark.case("C5")
def test_a_whole_job_needs_no_network(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    settings = {"stages": ALL, "data__dir": tmp_path / "data", "steps": 2}
    settings |= {"calibration__path": None}
    done = launcher.run(lab.student(tmp_path, **settings), inject=injection("offline"))
    assert done.code == 0, done.text
    assert (tmp_path / "student" / "report" / "index.html").is_file()


@pytest.mark.case("C5", control=True)
def test_the_isolation_from_the_network_is_one(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"SERVER_PORT": str(server.getsockname()[1])}
        overrides = lab.student(tmp_path, steps=1)
        isolated = injection("offline_that_needs_a_server")
        assert launcher.run(overrides, env=env, inject=isolated).code == 1
        assert launcher.run(overrides, env=env, inject=injection("needs_a_server")).code == 0


LONG = "längere Wörter " * 12 + "and 'quotes' "


@pytest.mark.case("C7")
def test_odd_paths_an_unwritable_working_folder_and_no_home_do_no_harm(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    runs = tmp_path / LONG.strip()
    assert len(runs.name.encode()) > 200
    stages = ["calibrate", "train", "evaluate", "export", "report"]
    overrides = lab.student(
        runs, stages=stages, steps=2, checkpoint_every=1, calibration__path=None
    )
    quoted = [f"{key}='{value}'" for key, value in [("runs_dir", str(runs).replace("'", "\\'"))]]
    overrides = [o for o in overrides if not o.startswith("runs_dir=")] + quoted
    done = launcher.run(
        overrides,
        env={"HOME": None},
        inject=injection("in_a_folder_that_cannot_be_written"),
    )
    assert done.code == 0, done.text
    assert (runs / "student" / "report" / "index.html").is_file()
    assert launcher.run(overrides).code == 0


@pytest.mark.slow
@pytest.mark.case("C8")
def test_accelerate_launch_without_any_flag_or_config_works(
    rounds: Any, lab: Any, tmp_path: Path
) -> None:
    if not list(rounds(0, 1)):
        pytest.skip("in full counts only")
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "gossamer.train"]
    done = subprocess.run(
        [*command, *lab.student(tmp_path, steps=2)],
        env={**os.environ, "PYTHONPATH": str(lab.source), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.case("C9")
def test_no_memory_at_the_first_step_ends_with_an_estimate_three_settings_and_exit_4(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path), inject=injection("out_of_memory"))
    assert done.code == 4 and "Traceback" not in done.text and len(done.errors) == 1
    line = done.errors[0]
    assert "train out of memory on cpu (CUDA out of memory. Tried to allocate 2.00 GiB.)" in line
    assert "room for a training step: " in line and " GiB at the peak" in line
    assert line.endswith(
        "set gradient_checkpointing=true, grad_accumulation=4, teacher=cached noise_draws=16"
    )


@pytest.mark.case("C9", control=True)
def test_memory_errors_that_are_not_caught_are_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path), inject=injection("out_of_memory_unhandled"))
    assert done.code == 1 and "Traceback" in done.text


def rows(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "student" / "metrics.jsonl").open()]


def assert_clock_proof(lab: Any, launcher: Any, runs: Path, inject: str) -> None:
    done = launcher.run(lab.student(runs), inject=inject)
    assert done.code == 0, done.text
    found = rows(runs)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert all(0 <= row["data_seconds"] <= row["step_seconds"] < 60 for row in found)
    assert [p.name for p in sorted((runs / "student" / "checkpoints").iterdir())] == [
        "step-4",
        "step-8",
    ]


@pytest.mark.case("C10")
def test_a_clock_that_jumps_back_changes_no_count(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    assert_clock_proof(lab, launcher, tmp_path, injection("clock_that_jumps_back"))


@pytest.mark.case("C10", control=True)
def test_a_loop_that_reads_a_jumping_clock_is_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        assert_clock_proof(lab, launcher, tmp_path, injection("monotonic_that_jumps_back"))


def memory_and_files(pid: int) -> tuple[float, int]:
    """Return a process's resident memory in MB and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def soak(job: Any, folder: Path, steps: int) -> tuple[list[float], list[int], int]:
    """Watch a job: memory and open files at ten moments of its second half; most checkpoints."""
    memory, files, most = [], [], 0
    metrics = folder / "metrics.jsonl"
    moments = [steps // 2 + i * steps // 20 for i in range(10)]
    while moments:
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        checkpoints = folder / "checkpoints"
        if checkpoints.is_dir():
            most = max(most, sum(p.name.startswith("step-") for p in checkpoints.iterdir()))
        if done >= moments[0]:
            moments.pop(0)
            used, opened = memory_and_files(job.pid)
            memory.append(used)
            files.append(opened)
        time.sleep(0.02 + steps / 1e6)
    return memory, files, most


def assert_flat(memory: list[float], files: list[int]) -> None:
    """Require no growth of over 1 % of memory or 4 MB, and of two files, over half the run."""
    early, late = sum(memory[:3]) / 3, sum(memory[-3:]) / 3
    assert late - early < max(4, 0.01 * early), memory
    assert files[-1] - files[0] <= 2, files


@pytest.mark.slow
@pytest.mark.case("SOAK")
def test_a_long_run_leaks_no_memory_or_files_and_bounds_its_checkpoints(
    rounds: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    steps = len(list(rounds(200, 50_000)))
    job = launcher.start(lab.student(tmp_path, steps=steps, checkpoint_every=20))
    memory, files, most = soak(job, tmp_path / "student", steps)
    assert job.wait().code == 0
    assert_flat(memory, files)
    assert most <= 3  # two kept, and the new one until the oldest goes


@pytest.mark.slow
@pytest.mark.case("SOAK", control=True)
def test_a_leak_of_a_little_memory_and_a_file_each_step_is_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, steps=120, checkpoint_every=100)
    job = launcher.start(overrides, inject=injection("leaking"))
    memory, files, _ = soak(job, tmp_path / "student", 120)
    job.wait()
    with pytest.raises(AssertionError):
        assert_flat(memory, [0, 0])
    with pytest.raises(AssertionError):
        assert_flat([1.0] * 10, files)
