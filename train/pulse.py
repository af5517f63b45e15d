"""The processes of a run watch each other, so that none waits for a dead one."""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import PrefixStore

from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two looks
LIMIT = 40.0  # seconds without a sign of life after which a process counts as dead
GRACE = 8.0  # seconds that a process has to end by itself once another is gone
MEETING = 600.0  # seconds for all processes to start
MISSED = 3.5  # beats; one who said nothing in that time, after a call to it failed, is gone

_LEFT, _FAILED, _ENDED, _GONE = "left", "failed", "ended: ", "gone"


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
            if _has_machines():
                self._store.set(f"host {self._rank}", socket.gethostname())
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
        # on one machine its launcher says at once which process it was
        missing = self._missing() if _has_machines() and is_of_a_peer(error) else ""
        self._stop.set()
        self._thread.join(2 * BEAT)
        last = _LEFT
        if missing:
            last = f"{_ENDED}{missing}"
        elif error is not None and not isinstance(error, SystemExit):  # which all agreed on
            last = f"{_FAILED}: {' '.join(f'{type(error).__name__} {error}'.split())[:300]}"
            if not isinstance(error, Refusal):  # which the command line says
                log.error("process %d of %d %s", self._rank, self._world, last)
        say = threading.Thread(target=self._say, args=(last,), daemon=True)
        say.start()
        say.join(2 * BEAT)  # the store may not answer any more
        if missing:  # a traceback would not say more, and a broken group may hang at exit
            self._leave(missing)

    def _say(self, last: str) -> None:
        try:
            self._store.set(str(self._rank), last)
        except (dist.DistError, RuntimeError):
            log.warning("process 0 has ended before process %d", self._rank)

    def _missing(self) -> str:
        """Say who is gone, after a call to the others failed; "" where all still say something."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        try:
            before = {rank: self._said(rank) for rank in others}
            time.sleep(MISSED * BEAT)
            after = {rank: self._said(rank) for rank in others}
            for rank, said in after.items():
                if said.startswith(_FAILED):
                    return f"{self._name(rank)} {said}"
            for rank, said in after.items():
                if said == before[rank] and said != _LEFT and not said.startswith(_ENDED):
                    seconds = MISSED * BEAT
                    return f"{self._name(rank)} has not been heard of for {seconds:g} s"
            return next((s.removeprefix(_ENDED) for s in after.values() if s != _LEFT), "")
        except (dist.DistError, RuntimeError):
            return _no_store()

    def _said(self, rank: int) -> str:
        key = str(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _name(self, rank: int, store: Any = None) -> str:
        """Return what to call a process: with its machine, where there are several."""
        store, key = store or self._store, f"host {rank}"
        host = f" on {store.get(key).decode()}" if store.check([key]) else ""
        return f"process {rank}{host}"

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
                names = {rank: self._name(rank, store) for rank in heard}
            except (dist.DistError, RuntimeError):
                self._end(_no_store())
                return
            self._looked = time.monotonic()
            for rank, (said, at) in list(heard.items()):
                if said == _LEFT:
                    del heard[rank]
                elif said.startswith(_ENDED):
                    gone = gone or said.removeprefix(_ENDED)
                elif said.startswith(_FAILED):
                    gone = gone or f"{names[rank]} {said}"
                elif time.monotonic() - at > LIMIT:
                    gone = gone or f"{names[rank]} has not been heard of for {LIMIT:g} s"
            if gone:
                if self._rank == 0:
                    store.set(_GONE, gone)
                self._end(gone)
                return

    def _watch_store(self) -> None:
        """End when the store itself, in process 0 or its launcher, does not answer any more."""
        while not self._stop.wait(BEAT):
            if time.monotonic() - self._looked > LIMIT:
                self._end(f"process 0{_place()} has not been heard of for {LIMIT:g} s")
                return

    def _end(self, why: str) -> None:
        """End the process, unless it does so by itself in a while."""
        if not self._stop.wait(GRACE):
            self._leave(why)

    def _leave(self, why: str) -> None:
        sys.stderr.write(f"error: {why}: ending process {self._rank}\n")
        sys.stderr.flush()
        os._exit(1)


def is_of_a_peer(error: BaseException | None) -> bool:
    """Say whether an error is that of a call between processes, which another one's end causes."""
    has_no_class = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return has_no_class or isinstance(error, dist.DistError)


def _has_machines() -> bool:
    """Say whether the launcher started the run on several machines."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


def _place() -> str:
    """Return where the processes met, if on several machines, as a part of a sentence."""
    if not _has_machines():
        return ""
    return f" at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _no_store() -> str:
    return f"process 0, or the launcher that it met in{_place()}, has ended"


@contextmanager
def meeting(seconds: float | None = None) -> Iterator[None]:
    """End the process, with a word why, if the block takes too long: some process is missing.

    Raises Refusal where the processes do not reach each other.
    """
    world, limit = int(os.environ.get("WORLD_SIZE", "1")), seconds or MEETING
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    over = threading.Event()

    def give_up(why: str) -> None:
        sys.stderr.write(
            f"error: num_processes={world}: allowed is as many as were started, and {why}; check "
            "--num_processes, --num_machines and --machine_rank of each accelerate launch\n"
        )
        sys.stderr.flush()
        os._exit(2)

    def watch(store: Any) -> None:
        """End when the place to meet in, the first launcher or process, has ended."""
        try:
            while not over.wait(BEAT):
                store.check(["meeting"])
        except (dist.DistError, RuntimeError):
            if not over.wait(GRACE):
                give_up(f"the launcher or process at {where} ended before all had met")

    late = f"all did not meet at {where} in {limit:g} s"
    timer = threading.Timer(limit, give_up, (late,))
    timer.daemon = True
    if world > 1:
        timer.start()
    try:
        if world > 1 and os.environ.get("RANK") != "0":
            # Not in the thread: it reads environment variables, and what follows here sets some.
            host, _, port = where.rpartition(":")
            wait = timedelta(seconds=2 * limit)  # the timer ends first
            store = dist.TCPStore(host, int(port), timeout=wait, wait_for_workers=False)
            threading.Thread(target=watch, args=(store,), daemon=True).start()
        yield
    except RuntimeError as error:
        if world == 1 or not is_of_a_peer(error):
            raise
        allowed = f"processes that reach each other: {str(error).splitlines()[0]}"
        fix = "set GLOO_SOCKET_IFNAME, on GPUs NCCL_SOCKET_IFNAME, to the network that joins them"
        raise Refusal("num_processes", world, allowed, fix) from error
    finally:
        over.set()
        timer.cancel()
