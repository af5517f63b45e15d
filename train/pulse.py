"""The processes of a run watch each other, so that none waits for a dead one."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import PrefixStore

log = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two looks
LIMIT = 40.0  # seconds without a sign of life after which a process counts as dead
GRACE = 8.0  # seconds that a process has to end by itself once another is gone
MEETING = 600.0  # seconds for all processes to start

_LEFT, _FAILED, _GONE = "left", "failed", "gone"


class Pulse:
    """Ends this process within a minute of another's death, and says which process it was.

    Every process writes a beat into the store that torch.distributed met in; the first one looks
    after all others, and they after it. A thread does it: the main one may wait for ever in a
    collective, and the first one's store may not answer. Without other processes it does nothing.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._rank, self._world = accelerator.process_index, accelerator.num_processes
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def __enter__(self) -> Self:
        if self._world > 1:
            # Clones: a store's client serves one call at a time, and some wait for hours.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = PrefixStore("pulse", store.clone())
            self._looked = time.monotonic()
            self._thread = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_store, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(2 * BEAT)
        last = _LEFT
        if error is not None and not isinstance(error, SystemExit):  # which all processes agreed on
            last = f"{_FAILED}: {' '.join(f'{type(error).__name__} {error}'.split())[:300]}"
            log.error("process %d of %d %s", self._rank, self._world, last)
        say = threading.Thread(target=self._say, args=(last,), daemon=True)
        say.start()
        say.join(2 * BEAT)  # the store may not answer any more

    def _say(self, last: str) -> None:
        try:
            self._store.set(str(self._rank), last)
        except (dist.DistError, RuntimeError):
            log.warning("process 0 has ended before process %d", self._rank)

    def _watch(self, store: Any) -> None:
        store = PrefixStore("pulse", store)
        others = [r for r in range(self._world) if (r == 0) != (self._rank == 0)]
        heard = {rank: ("", time.monotonic()) for rank in others}
        beat = 0
        while not self._stop.wait(BEAT if beat else 0):
            beat += 1
            try:
                store.set(str(self._rank), f"beat {beat}")
                for rank in list(heard):
                    if store.check([str(rank)]):
                        said = store.get(str(rank)).decode()
                        if said != heard[rank][0]:
                            heard[rank] = (said, time.monotonic())
                gone = store.get(_GONE).decode() if store.check([_GONE]) else ""
            except (dist.DistError, RuntimeError):
                self._end("process 0, or the launcher that it met in, has ended")
                return
            self._looked = time.monotonic()
            for rank, (said, at) in list(heard.items()):
                if said == _LEFT:
                    del heard[rank]
                elif said.startswith(_FAILED):
                    gone = gone or f"process {rank} {said}"
                elif time.monotonic() - at > LIMIT:
                    gone = gone or f"process {rank} has not been heard of for {LIMIT:g} s"
            if gone:
                if self._rank == 0:
                    store.set(_GONE, gone)
                self._end(gone)
                return

    def _watch_store(self) -> None:
        """End when the store itself, in process 0 or its launcher, does not answer any more."""
        while not self._stop.wait(BEAT):
            if time.monotonic() - self._looked > LIMIT:
                self._end(f"process 0 has not been heard of for {LIMIT:g} s")
                return

    def _end(self, why: str) -> None:
        """End the process, unless it does so by itself in a while."""
        if self._stop.wait(GRACE):
            return
        sys.stderr.write(f"error: {why}: ending process {self._rank}\n")
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def meeting(seconds: float | None = None) -> Iterator[None]:
    """End the process, with a word why, if the block takes too long: some process is missing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def give_up() -> None:
        sys.stderr.write(
            f"error: num_processes={world}: allowed is as many as were started, and all did not "
            f"meet at {where} in {seconds or MEETING:g} s; check --num_processes, --num_machines "
            "and --machine_rank of each accelerate launch\n"
        )
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds or MEETING, give_up)
    timer.daemon = True
    if world > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
