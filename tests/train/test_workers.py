"""A pool of workers: every job once, dead workers replaced, nothing begun after the time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer.train import worker, workers
from gossamer.train.interrupt import Terminated, terminable
from gossamer.train.refusal import DiskFailed, Refusal
from gossamer.train.workers import KILLED, Pool, Task

SCRIPT = """
import json, os, signal, sys, time
def end(*_):
    raise InterruptedError
signal.signal(signal.SIGTERM, end)
for line in sys.stdin:
    request = json.loads(line)
    word, *rest = request["overrides"]
    code = 0
    try:
        if word == "die":
            os._exit(7)
        if word == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if word in ("sleep", "ignore"):
            time.sleep(float(rest[0]))
        if word == "code":
            code = int(rest[0])
    except InterruptedError:
        code = 143
    open(request["log"], "a").write(f"{word} {os.environ['ACCELERATE_MIXED_PRECISION']}\\n")
    print(code, flush=True)
"""
TRAINING = """
import sys, time
from pathlib import Path
from gossamer.train.interrupt import stoppable
log = Path(sys.argv[1])
with stoppable() as stop:
    log.write_text("begun")
    while not stop.asked:
        time.sleep(0.01)
    time.sleep(0.5)
    log.write_text(f"saved at {stop.asked.name}")
    stop.agree(stop.votes)
"""
SWEEP = """
import signal, sys
from pathlib import Path
from gossamer.train import workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
workers.COMMAND = [sys.executable, "-c", *sys.argv[1:]]
with workers.Pool(1, "no") as pool:
    list(pool.run([workers.Task("a", [], Path(sys.argv[2]))], None))
"""
LAUNCHER = """
import subprocess, sys
assert sys.stdin.read() == ""
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
STUBBORN = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def small_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", SCRIPT])
    monkeypatch.setattr(workers, "LEAST", 0.0)


def tasks(folder: Path, *jobs: str) -> list[Task]:
    return [Task(f"{i} {job}", job.split(), folder / f"{i}.log") for i, job in enumerate(jobs)]


def test_each_job_is_done_once_and_codes_come_back(tmp_path: Path) -> None:
    with Pool(2, "bf16") as pool:
        found = {
            done.task.name: done.code
            for done in pool.run(tasks(tmp_path, "a", "code 2", "die", "b", "c"), None)
        }
    assert found == {"0 a": 0, "1 code 2": 2, "2 die": 7, "3 b": 0, "4 c": 0}
    assert (tmp_path / "4.log").read_text() == "c bf16\n"


def test_at_the_deadline_jobs_in_hand_stop_and_the_others_wait(tmp_path: Path) -> None:
    start = time.monotonic()
    with Pool(1, "no") as pool:
        jobs = tasks(tmp_path, "a", "sleep 60", "b")
        found = [(done.task.name, done.code) for done in pool.run(jobs, start + 3)]
    assert found == [("0 a", 0), ("1 sleep 60", 143)]
    assert time.monotonic() - start < 30


def test_a_job_that_does_not_stop_within_the_grace_is_told_from_one_that_did(
    tmp_path: Path,
) -> None:
    start = time.monotonic()
    with Pool(2, "no", grace=3) as pool:
        jobs = tasks(tmp_path, "ignore 60", "sleep 60")
        found = {done.task.name: done.code for done in pool.run(jobs, start + 3)}
    assert found == {"0 ignore 60": KILLED, "1 sleep 60": 143}
    assert time.monotonic() - start < 30


def test_leaving_the_pool_ends_its_workers(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Pool(2, "no") as pool:
        for _ in pool.run(tasks(tmp_path, "a", "sleep 60", "sleep 60"), None):
            raise KeyError
    assert all(process.poll() is not None for process in pool._processes.values())


def begun(log: Path) -> Path:
    """Wait until a training writes its log."""
    end = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    return log


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def launch_until_terminated(script: str, log: Path, grace: float) -> None:
    """Launch a training, and send SIGTERM to this process once it has begun."""
    told = threading.Thread(target=lambda: begun(log) and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated), terminable(), log.with_suffix(".said").open("wb") as said:
        told.start()
        workers.launch([sys.executable, "-c", LAUNCHER, script, str(log)], said, grace)
    told.join()


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gossamer.__file__).parents[1]))


def test_a_ctrl_c_in_the_terminal_reaches_a_worker_as_one_sigterm(
    importable: None, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SWEEP, TRAINING, tmp_path / "log"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as parent:
        begun(tmp_path / "log")
        os.killpg(parent.pid, signal.SIGINT)
    assert (tmp_path / "log").read_text() == "saved at SIGTERM"


def test_a_training_told_to_stop_may_save_after_its_launcher_ended(
    importable: None, tmp_path: Path
) -> None:
    launch_until_terminated(TRAINING, tmp_path / "log", 60)
    assert (tmp_path / "log").read_text() == "saved at SIGTERM"


def test_a_training_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    launch_until_terminated(STUBBORN, tmp_path / "log", 0.5)
    pid, end = int((tmp_path / "log").read_text()), time.monotonic() + 30
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not lives(pid)


def test_a_worker_is_no_rank_of_a_launcher_that_started_the_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in launched:
        monkeypatch.setenv(name, "1")
    environment = workers._environment(0, 1, "bf16")
    assert not environment.keys() & {*launched} and environment["PATH"] == os.environ["PATH"]


def test_a_job_gives_the_exit_code_of_gossamer_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cfg: Any, kept: Any) -> None:
        raise DiskFailed("checkpoints", "there", "a disk that takes them", "free some space")

    monkeypatch.setattr("gossamer.train.run.run", run)
    assert worker.work([], {}) == DiskFailed.code == 3
    assert worker.work(["sparsty=1"], {}) == Refusal.code == 2
