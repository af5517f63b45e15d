"""One run in a folder at a time."""

import fcntl
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from gossamer.train.files import is_seen
from gossamer.train.refusal import Refusal

LOCK = "run.lock"
BEAT = 10.0  # seconds between two beats of a holder
STALE = 60.0  # seconds without a beat after which a holder on another machine counts as dead
LOOK = 0.5  # seconds between two looks of one who waits for the lock
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_WIDTH = 200  # characters; rewritten in place, so that no reader finds the file empty

logger = logging.getLogger(__name__)


class RunLock:
    """Hold a folder for one process; Refusal, of the key `field`, while another process holds it.

    With `wait` it waits until the other is done or dead instead. A process that died on this
    machine frees the lock. One of another machine cannot be asked: it counts as dead when the file
    system does not hold its lock and it writes no beat for STALE seconds, which are waited here.
    """

    def __init__(self, folder: Path, field: str = "run_dir", *, wait: bool = False) -> None:
        self._path, self._field, self._wait = folder / LOCK, field, wait
        self._is_waiting = False
        self._file: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.holder = ""  # what the file says of this process while it holds the lock

    def __enter__(self) -> Self:
        while holder := self._take():
            if not self._wait:
                fix = f"stop {holder}; if it is gone, delete {self._path.name} there"
                raise Refusal(self._field, self._path.parent, "a folder no other run writes", fix)
            if not self._is_waiting:
                logger.info("waiting for %s to be done with %s", holder, self._path.parent)
            self._is_waiting = True
            time.sleep(LOOK)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._stop.set()
            self._thread.join()
            os.ftruncate(self._file, 0)
            os.close(self._file)

    def check_seen(self, holder: str) -> None:
        """Refuse a folder in which this process does not see the lock of `holder`.

        The holder itself must not call it: closing a file drops its process's locks on it.
        """

        def is_there() -> bool:
            return " ".join(_words(_read(self._path))[:3]) == holder

        if not self.holder and not is_seen(is_there):
            allowed = "one folder that all machines share"
            fix = "put it on a disk that all of them see (runs_dir=...)"
            raise Refusal(self._field, self._path.parent, allowed, fix)

    def _take(self) -> str:
        """Take the lock and return "", or return who holds it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # opened anew for each look: somebody may delete the file of one that is gone
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            fix = f"choose another folder: {error}"
            raise Refusal(self._field, self._path.parent, "a folder to write into", fix) from error
        try:
            holder = self._holder(file)
            if not holder:
                self.holder = f"{os.getpid()} {this_machine()} {_started(str(os.getpid())) or '-'}"
                self._write(file, 0)
                self._file = file
        finally:
            if self._file is None:
                os.close(file)
        return holder

    def _holder(self, file: int) -> str:
        """Return who holds the file, "" where this process locked it."""
        words = _words(os.pread(file, _WIDTH, 0))
        pid, host, started = words[:3] if len(words) >= 3 else ("", "", "")
        is_held, here = self._is_held(file), this_machine()
        name = f"process {pid} on {host.partition('/')[0]}" if pid else "the other process"
        if not is_held and pid and host != here:
            if not self._is_waiting:
                said = "%s is of process %s on %s: waiting %g s for a sign of life"
                logger.warning(said, self._path, pid, host, STALE)
            is_held = self._has_beat(words) or self._is_held(file)
        if is_held or (host == here and _started(pid) == started):
            return name
        if pid:
            logger.warning("taking over %s from process %s, which died", self._path, pid)
        return ""

    def _is_held(self, file: int) -> bool:
        try:
            # The kernel drops this lock at death, and forked data workers do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError as error:
            if not self._is_waiting:
                logger.warning("%s cannot be locked (%s), trusting what it says", self._path, error)
        return False

    def _has_beat(self, words: list[str]) -> bool:
        """Wait for a sign of life of a holder on another machine."""
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 10))
            # Opened anew each time, which is what makes NFS look; it drops this process's lock.
            if _words(_read(self._path)) != words:
                return True
        return False

    def _write(self, file: int, beat: int) -> None:
        os.pwrite(file, f"{self.holder} {beat}".ljust(_WIDTH).encode(), 0)
        os.fsync(file)

    def _beat(self) -> None:
        file, beat = self._file, 0
        assert file is not None
        while not self._stop.wait(BEAT):
            beat += 1
            try:
                self._write(file, beat)
            except OSError as error:
                logger.warning("%s cannot be written: %s", self._path, error)


def this_machine() -> str:
    """Return the name of this machine since its start: machines may be called the same."""
    boot = _read(_BOOT).decode().strip()[:13] or "-"
    return f"{socket.gethostname()}/{boot}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _words(content: bytes) -> list[str]:
    return content.decode("utf-8", errors="replace").split()


def _started(pid: str) -> str:
    """Tell when a living process started, in ticks since boot; its pid alone may be reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
