"""Shards on their way here: a local folder, or a URL that fsspec knows with a folder as cache."""

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.train.data.quarantine import BadData
from gossamer.train.data.shards import MANIFEST, Shard
from gossamer.train.files import write_atomic
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

WAITS = (1.0, 4.0)  # seconds before a failed transfer is tried again, at the start of a run
OUTAGE = (1.0, 4.0, 15.0, 60.0, 120.0)  # in its middle
_opened: dict[tuple[int, str], tuple[Any, str]] = {}  # a session takes S3 half a second to open
_CODEC_FILE = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Store:
    """The shards of an encoded folder; of a URL's, `folder` keeps those fetched.

    At most `cache_bytes` of them are kept, the longest unused go first.
    """

    folder: Path
    url: str | None = None
    cache_bytes: int | None = None

    def get(self, shard: Shard) -> Path:
        """Return a shard's file once its SHA-256 is checked; BadData where it is damaged.

        Raises Refusal where the place cannot be reached: an outage changes no sample order.
        """
        difference = shard.difference(self.folder)
        path = self.folder / shard.file
        if self.url is None:
            if difference:
                raise BadData(difference)
            return path
        if difference is None:
            os.utime(path)  # used last
            return path
        return self._fetch(shard)

    def _fetch(self, shard: Shard) -> Path:
        assert self.url is not None
        place, path = f"{self.url.rstrip('/')}/{shard.file}", self.folder / shard.file
        inbox = self.folder / ".fetching" / str(os.getpid())
        inbox.mkdir(parents=True, exist_ok=True)
        try:
            transfer(place, inbox / shard.file, shard.bytes)
            if shard.difference(inbox):  # a transfer may be what damages it
                transfer(place, inbox / shard.file, shard.bytes)
            if difference := shard.difference(inbox):
                raise BadData(difference)
            (inbox / shard.file).replace(path)
        finally:
            (inbox / shard.file).unlink(missing_ok=True)
        self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        if self.cache_bytes is None:
            return
        kept = []
        for file in self.folder.glob("*.parquet"):
            try:
                kept.append((file.stat(), file))
            except FileNotFoundError:  # another process made room
                continue
        total = sum(stat.st_size for stat, _ in kept)
        for stat, file in sorted(kept, key=lambda item: item[0].st_mtime_ns):
            if total > self.cache_bytes and file != newest:
                file.unlink(missing_ok=True)  # who reads it goes on: the file stays until closed
                total -= stat.st_size


def mirror(url: str, folder: Path) -> None:
    """Bring the manifest and the codec of an encoded folder into the local one."""

    def copy() -> None:
        files, root = _open(url)
        files.invalidate_cache()  # of an earlier run in this process
        content = files.cat_file(f"{root}/{MANIFEST}")
        own = folder / MANIFEST
        is_new = not own.is_file() or own.read_bytes() != content  # a codec of the same size too
        for source, entry in files.find(f"{root}/codec", detail=True).items():
            name = source.rpartition("/")[2]
            path = folder / "codec" / name
            if source != f"{root}/codec/{name}" or not _CODEC_FILE.fullmatch(name):
                allowed = "files of a codec, without folders"
                raise Refusal("data.dir", source, allowed, "copy the encoded folder again")
            if is_new or not path.is_file() or path.stat().st_size != entry["size"]:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, files.cat_file(source))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(own, content)

    try:
        _patiently(copy, url, WAITS)
    except FileNotFoundError as error:
        raise Refusal(
            "data.dir",
            url,
            f"a place with {MANIFEST}",
            "encode into a local folder and copy that there",
        ) from error


def transfer(place: str, path: Path, size: int) -> None:
    """Copy one file of a URL here; BadData where it is missing, or not of `size` (0: unknown)."""

    folder, _, name = place.rpartition("/")

    def copy() -> None:
        files, root = _open(folder)
        source = f"{root}/{name}"
        found = files.info(source)["size"]
        if size and found != size:
            raise BadData(f"{found} bytes instead of {size}")
        files.get_file(source, str(path))

    try:
        _patiently(copy, place, OUTAGE)
    except FileNotFoundError as error:
        raise BadData("missing") from error


def _patiently(copy: Any, place: str, waits: tuple[float, ...]) -> None:
    for wait in (*waits, None):
        try:
            return copy()
        except (BadData, Refusal, FileNotFoundError):
            raise
        except Exception as error:  # each kind of store has its own errors
            if wait is None:
                allowed = "a place that can be read"
                fix = f"check the network and your rights: {type(error).__name__}: {error}"
                raise Refusal("data.dir", place, allowed, fix) from error
            _opened.clear()  # a new connection, with the rights of now
            said = " ".join(redact(f"{place} cannot be read, again in {wait:g} s: {error}").split())
            log.warning("%s", said)
            time.sleep(wait)
    return None


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it, one a process: forks share none."""
    import fsspec

    key = (os.getpid(), url)
    if key in _opened:
        return _opened[key]
    try:
        files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        allowed = "a protocol whose fsspec package is installed"
        raise Refusal("data.dir", url, allowed, str(error)) from error
    _opened[key] = files, path.rstrip("/")
    return _opened[key]
