"""One who waits for a lock takes it when the holder is done, and when it is dead."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gossamer
from gossamer.train import run_lock
from gossamer.train.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from gossamer.train.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""
LATER = 0.5  # seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(run_lock, "LOOK", 0.05)
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    caplog.set_level("INFO")


@pytest.mark.parametrize("is_killed", [False, True])
def test_of_this_machine(is_killed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(Path(gossamer.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        end = threading.Timer(LATER, holder.kill if is_killed else holder.stdin.close)
        start = time.monotonic()
        end.start()
        with RunLock(tmp_path, wait=True) as lock:
            assert LATER < time.monotonic() - start < 30
            assert (tmp_path / "run.lock").read_text().split()[:3] == lock.holder.split()
        end.join()
    assert caplog.text.count(f"waiting for process {holder.pid} on") == 1
    assert (f"from process {holder.pid}, which died" in caplog.text) == is_killed


def test_of_another_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text("12 elsewhere/1 345 7")
    beat = threading.Timer(LATER, lock.write_text, ["12 elsewhere/1 345 8"])
    start = time.monotonic()
    beat.start()
    with RunLock(tmp_path, wait=True):
        assert run_lock.STALE < time.monotonic() - start < 30, "it beat once"
    beat.join()
    assert caplog.text.count("waiting for process 12 on elsewhere") == 1
    assert caplog.text.count("for a sign of life") == 1
