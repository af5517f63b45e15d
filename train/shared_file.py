"""Files that the jobs of a sweep leave each other: a help, which none of them needs."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from gossamer.train.files import write_atomic

log = logging.getLogger(__name__)

Found = TypeVar("Found")
RESERVE = 0.1, 50 * 2**30  # of a disk, and bytes: the lesser stays free for checkpoints


def take(file: Path, read: Callable[[Path], Found]) -> Found | None:
    """Return what `read` makes of another job's file, or None where none can be read."""
    try:
        return read(file) if file.is_file() else None
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be read, and is made anew: %s", file, error)
        return None


def leave(file: Path, content: bytes) -> bool:
    """Leave a file to other jobs, unless the disk has no room to spare; say whether it did."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        total, _, free = shutil.disk_usage(file.parent)
        share, most = RESERVE
        if free - len(content) < min(share * total, most):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(file, content)
    except OSError as error:
        log.warning("%s is not left to other jobs: %s", file, error)
        return False
    return True
