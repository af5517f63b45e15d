"""One run in a folder at a time."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from gossamer.train.refusal import Refusal

LOCK = "run.lock"

logger = logging.getLogger(__name__)


class RunLock:
    """Hold a folder for one process; Refusal, of the key `field`, while another process holds it.

    A process that died on this host frees the lock; one of another host cannot be asked.
    """

    def __init__(self, folder: Path, field: str = "run_dir") -> None:
        self._path, self._field = folder / LOCK, field
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            fix = f"choose another folder: {error}"
            raise Refusal(self._field, self._path.parent, "a folder to write into", fix) from error
        try:
            self._take(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()

    def _take(self, file: TextIO) -> None:
        file.seek(0)
        words = file.read().split()
        pid, host, started = words if len(words) == 3 else ("", "", "")
        try:
            # The kernel drops this lock at death, and forked data workers do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except (BlockingIOError, PermissionError):
            held = True
        except OSError as error:
            logger.warning("%s cannot be locked (%s), trusting what it says", self._path, error)
            held = False
        here = socket.gethostname()
        if held or (pid and (host != here or _started(pid) == started)):
            fix = f"stop process {pid} on {host}; if it is gone, delete {self._path.name} there"
            raise Refusal(self._field, self._path.parent, "a folder no other run writes", fix)
        if pid:
            logger.warning("taking over %s from process %s, which died", self._path, pid)
        file.truncate(0)
        file.write(f"{os.getpid()} {here} {_started(str(os.getpid())) or '-'}")
        file.flush()


def _started(pid: str) -> str:
    """Tell when a living process started, in ticks since boot; its pid alone may be reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
