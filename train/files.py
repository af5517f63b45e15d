"""Writes that outlive a crash: a name shows the old bytes or the new ones, never half of them."""

import hashlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

SEEN = 30.0  # seconds until the other machines see what one wrote: NFS remembers that it was not


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file `path` by `content` in one step, on disk when this returns."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Beside the target: os.replace is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sha256(path: Path) -> str:
    """Hash a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(tmp_dir: Path, final_dir: Path) -> None:
    """Rename a finished folder to its name once everything in it is on disk.

    Both must lie in one file system; `final_dir` must not exist, or be empty (OSError).
    """
    for path in [*tmp_dir.rglob("*"), tmp_dir]:
        sync(path)
    tmp_dir.replace(final_dir)
    sync(final_dir.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_seen(look: Callable[[], bool]) -> bool:
    """Look for what another machine wrote until it is there, for SEEN seconds."""
    end = time.monotonic() + SEEN
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.2)
    return found
