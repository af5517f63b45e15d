"""Files appear whole or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from gossamer.train.files import publish, sha256, write_atomic


def test_write_atomic_replaces_text_and_bytes_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "önce")
    assert path.read_bytes() == "önce".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda a, b: events.append("rename") or replace(a, b))
    write_atomic(tmp_path / "a.txt", "x")
    assert events == ["sync", "rename", "sync"]


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytes(range(256)) * 999
    path.write_bytes(data)
    assert sha256(path) == hashlib.sha256(data).hexdigest()


def test_publish_renames_a_folder_but_never_over_a_filled_one(tmp_path: Path) -> None:
    made, final = tmp_path / ".made", tmp_path / "final"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "a").write_text("x")
    publish(made, final)
    assert (final / "sub" / "a").read_text() == "x" and not made.exists()
    made.mkdir()
    with pytest.raises(OSError):
        publish(made, final)
    assert (final / "sub" / "a").exists()


def test_everything_in_a_folder_is_synced_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, final = tmp_path / ".made", tmp_path / "final"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "a").write_text("x")
    expected = {path.stat().st_ino for path in (made, made / "sub", made / "sub" / "a")}
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: synced.append(0) or replace(a, b))
    publish(made, final)
    assert set(synced[:3]) == expected
    assert synced[3:] == [0, tmp_path.stat().st_ino]
