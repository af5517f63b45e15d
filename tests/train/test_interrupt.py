"""A run asked to stop saves the step it is in, and goes on from there bit for bit."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.train import checkpoint, loop
from gossamer.train.distiller import Distiller
from gossamer.train.interrupt import SIGNALS, stoppable
from gossamer.train.losses import VelocityDistillation
from gossamer.train.run_lock import LOCK
from gossamer.train.trackers import NoTracker

STEPS = 16
SETTINGS = {"steps": STEPS, "checkpoint_every": 100, "ema": 0.9, "num_workers": 1}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Handle SIGINT as in a terminal: a shell that runs tests in the background ignores it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def rows(runs: Path) -> int:
    metrics = runs / "student" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_stopped(run: Any, after: int) -> None:
    """Require a whole checkpoint of the last step of the metrics, at most two past `after`."""
    assert checkpoint.latest(run.folder / "checkpoints") == run.newest
    assert run.newest.name == f"step-{len(run.losses)}"
    assert after <= len(run.losses) <= after + 2
    assert (run.folder / LOCK).read_text() == ""


@pytest.mark.case("F6", "F7")
def test_a_run_and_its_data_workers_told_to_stop_twice_ends_as_the_unbroken_one(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides, chance = lab.student(tmp_path, **SETTINGS), random.Random(0)
    for number, code, row in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 8)):
        running = launcher.start(overrides).when(lambda row=row: rows(tmp_path) >= row)
        time.sleep(chance.uniform(0, 0.02))
        workers = children(running.pid)
        assert workers
        for worker in workers:  # as a signal to the process group
            os.kill(worker, number)
        seen = rows(tmp_path)
        running.send(number)
        done = running.wait()
        assert done.code == code and "Traceback" not in done.text, done.text
        assert done.text.count(f"stopped by {number.name}: step ") == 1
        assert_stopped(lab.run(tmp_path), seen)
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    done = launcher.run(overrides)
    assert done.code == 0 and "which died" not in done.text, done.text
    assert lab.run(tmp_path).losses == unbroken.losses
    assert lab.run(tmp_path).weights == unbroken.weights


@pytest.mark.case("F6")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(
    number: signal.Signals, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    parts = {"batch_size": 4, "grad_accumulation": 4, "checkpoint_every": 1}
    slow = f"{__file__}:take_seconds_after_the_first_step"
    running = launcher.start(lab.student(tmp_path, **parts), inject=slow)
    running.when(lambda: (tmp_path / "student" / "checkpoints" / "step-1").exists())
    running.send(number)
    time.sleep(0.3)
    running.send(signal.SIGINT)
    done = running.wait()
    assert done.code == -signal.SIGINT and "stopped by" not in done.text
    assert lab.run(tmp_path).newest.name == "step-1"


def take_seconds_after_the_first_step() -> None:
    compute, calls = VelocityDistillation.__call__, iter(range(10**9))

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(0.5 * (next(calls) >= 4))
        return compute(self, *args)

    VelocityDistillation.__call__ = slow  # type: ignore[method-assign]


@pytest.mark.case("F6")
@pytest.mark.multi
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    for name in ("broken", "unbroken"):
        overrides, runs = lab.student(tmp_path / name, **SETTINGS), tmp_path / name
        if name == "broken":
            first, second = launcher.start_ranks(overrides)
            first.when(lambda runs=runs: rows(runs) >= 4)
            seen = rows(runs)
            second.send(signal.SIGTERM)
            done = [first.wait(), second.wait()]
            assert [one.code for one in done] == [143, 143], done[0].text + done[1].text
            assert "stopped by SIGTERM" in done[0].text and done[1].text == ""
            assert_stopped(lab.run(runs), seen)
        assert [one.code for one in launcher.ranks(overrides)] == [0, 0]
    broken, unbroken = (lab.run(tmp_path / name) for name in ("broken", "unbroken"))
    assert broken.losses == unbroken.losses and broken.weights == unbroken.weights


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_of_the_signal_is_the_last_and_the_handlers_come_back(
    number: signal.Signals, make_job: Any, lab: Any, tmp_path: Path
) -> None:
    class Stopping(VelocityDistillation):
        calls = 0

        def __call__(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), number)
            return super().__call__(*args)

    job, before = make_job(), [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SystemExit) as end:
        loop.train(
            Distiller(job.student(0), job.teacher(), Stopping(), job.draws(0)),
            job.dataset("train"),
            job.accelerator,
            loop.TrainSettings(steps=9, batch_size=4),
            folder=tmp_path,
            tracker=NoTracker(),
        )
    assert end.value.code == 128 + number
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert len(lab.run(tmp_path, "").losses) == 3
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_too_late_to_be_agreed_on_acts_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked is signal.SIGINT and stop.agreed is None


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def elsewhere() -> None:
        with stoppable():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            inside.append(signal.getsignal(signal.SIGINT))
        with stoppable() as stop:
            signal.raise_signal(signal.SIGTERM)
            inside.append(signal.getsignal(signal.SIGINT))
            stop.agree(stop.votes)
    finally:
        signal.signal(signal.SIGINT, old)
    assert inside == [before, signal.SIG_IGN, signal.SIG_IGN]
