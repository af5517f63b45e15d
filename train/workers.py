"""A pool of workers (train/worker.py), one to a GPU, that share out jobs until time runs out."""

import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

LEAST = 5.0  # seconds left below which no job is begun
COMMAND = [sys.executable, "-m", "gossamer.train.worker"]
# Set by a launcher for its own children; a job of a sweep is nobody's child.
_LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_\w+|TORCHELASTIC_\w+")
KILLED = 128 + signal.SIGKILL  # code of a job that was told to stop, and did not in time


@dataclass(frozen=True)
class Task:
    """A job to do: what it is called, its overrides and the file that takes what it prints."""

    name: str
    overrides: list[str]
    log: Path


@dataclass(frozen=True)
class Done:
    """A task that ended, with its exit code."""

    task: Task
    code: int
    seconds: float


class Pool:
    """Processes that each do one job after the other; a dead one is replaced."""

    def __init__(
        self, count: int, mixed_precision: str, velocities: str | None = None, grace: float = 120.0
    ) -> None:
        self._grace = grace
        self._command = COMMAND if velocities is None else [*COMMAND, velocities]
        self._environments = [_environment(i, count, mixed_precision) for i in range(count)]
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        for place in range(len(self._environments)):
            self._start(place)  # all import at the same time
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def run(self, tasks: Sequence[Task], deadline: float | None) -> Iterator[Done]:
        """Yield each task as it ends; past the deadline (time.monotonic()) those in hand are told
        to stop, and no other is begun."""
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        ended: queue.SimpleQueue[Done | None] = queue.SimpleQueue()
        places = range(len(self._environments))
        threads = [
            threading.Thread(target=self._serve, args=(p, waiting, ended, deadline), daemon=True)
            for p in places
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                found = ended.get(timeout=left)
            except queue.Empty:
                deadline = None
                threading.Thread(target=self.stop, daemon=True).start()
                continue
            if found is None:
                running -= 1
            else:
                yield found

    def stop(self) -> None:
        """Tell all workers to stop, once; kill those that still run after the seconds of grace."""
        with self._lock:
            processes = list(self._processes.values())
            is_told = self._stopping.is_set()
            self._stopping.set()
        for process in processes:
            if not is_told and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + self._grace
        try:
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, end - time.monotonic()))
        finally:  # also at a second Ctrl-C
            for process in processes:
                process.kill()

    def _start(self, place: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command,
            env=self._environments[place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for this process, which tells the worker once
        )
        with self._lock:
            self._processes[place] = process
        return process

    def _serve(
        self,
        place: int,
        waiting: "queue.SimpleQueue[Task]",
        ended: "queue.SimpleQueue[Done | None]",
        deadline: float | None,
    ) -> None:
        process = self._processes[place]
        try:
            while not self._stopping.is_set():
                if deadline is not None and deadline - time.monotonic() < LEAST:
                    return
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                start = time.monotonic()
                code = _ask(process, task)
                if code is None:
                    code = process.wait()
                    if self._stopping.is_set():
                        code = KILLED if code == -signal.SIGKILL else 128 + signal.SIGTERM
                    else:
                        process = self._start(place)
                ended.put(Done(task, code, time.monotonic() - start))
        finally:
            ended.put(None)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # of a worker that died
                process.stdin.close()


def launch(command: Sequence[str], log: IO[bytes], grace: float) -> int:
    """Start a job's launcher and return its exit code; an interrupt here stops the job first.

    The job has the seconds of grace to stop. A launcher that is told to stop ends before the
    training that it started. All of them have one end of a socket as stdin, and the other end tells
    when the last of them is gone.
    """
    ours, theirs = socket.socketpair()
    ours.shutdown(socket.SHUT_WR)  # nothing to read for the job
    with ours:
        with theirs:
            process = subprocess.Popen(
                command,
                env=own_environment(),
                stdin=theirs.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                select.select([ours], [], [], grace)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise


def own_environment() -> dict[str, str]:
    """Return the environment of a job: this process's without what a launcher gave it."""
    return {name: v for name, v in os.environ.items() if not _LAUNCHER.fullmatch(name)}


def sharing(count: int) -> int:
    """Return how many of so many workers run on one device at the same time."""
    import torch

    return -(-count // max(1, torch.cuda.device_count()))


def _ask(process: "subprocess.Popen[str]", task: Task) -> int | None:
    """Return the exit code of the task, or None where the worker died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps({"overrides": task.overrides, "log": str(task.log)}) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    return int(answer) if answer.strip() else None


def _environment(place: int, count: int, mixed_precision: str) -> dict[str, str]:
    """Return a worker's environment: its GPU, its share of the processors, its precision."""
    import torch

    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {
        **own_environment(),
        "ACCELERATE_MIXED_PRECISION": mixed_precision,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % num_gpus]
    return environment
