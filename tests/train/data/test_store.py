"""Shards from a URL: fetched once, checked, kept within a bound."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from gossamer.train.data import store as store_module
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.data.quarantine import BadData
from gossamer.train.data.shards import Manifest
from gossamer.train.data.store import Store, mirror
from gossamer.train.refusal import Refusal


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(store_module, "OUTAGE", (0.0, 0.0))


@pytest.fixture
def remote(make_data: Callable, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An encoded folder, and a copy of it in the memory file system."""
    folder = make_data(tmp_path / "local", shards=6)
    files = fsspec.filesystem("memory")
    for file in folder.rglob("*.*"):
        files.pipe(f"/bucket/data/{file.relative_to(folder)}", file.read_bytes())
    yield folder, "memory://bucket/data"
    files.rm("/bucket", recursive=True)


def opened(url: str, folder: Path, **options: object) -> LatentDataset:
    mirror(url, folder)
    return LatentDataset(folder, "train", url=url, **options)  # type: ignore[arg-type]


def test_a_url_gives_the_items_of_the_folder(remote: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = remote
    local, streamed = LatentDataset(folder, "train"), opened(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.parquet"))
    for index in (23, 0, 7):
        assert torch.equal(local[index]["latent"], streamed[index]["latent"])
    fetched = sorted(path.name for path in (tmp_path / "cache").glob("*.parquet"))
    assert fetched == ["train-00000.parquet", "train-00001.parquet", "train-00005.parquet"]
    assert (tmp_path / "cache/codec/config.json").read_text() == "{}"
    assert not list((tmp_path / "cache/.fetching").rglob("*.parquet"))


def test_a_codec_of_the_same_size_is_fetched_with_a_new_manifest(
    remote: tuple[Path, str], tmp_path: Path
) -> None:
    _, url = remote
    files = fsspec.filesystem("memory")
    mirror(url, tmp_path / "cache")
    files.pipe("/bucket/data/codec/config.json", b"[]")
    mirror(url, tmp_path / "cache")
    own = tmp_path / "cache/codec/config.json"
    assert own.read_text() == "{}", "the size is all that is looked at"
    files.pipe("/bucket/data/manifest.json", files.cat_file("/bucket/data/manifest.json") + b"\n")
    mirror(url, tmp_path / "cache")
    assert own.read_text() == "[]"


def test_a_shard_is_fetched_once_and_again_only_if_the_copy_is_damaged(
    remote: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    transfer = store_module.transfer
    monkeypatch.setattr(
        store_module, "transfer", lambda *args: (fetched.append(args[1].name), transfer(*args))
    )
    for expected in (1, 1):
        data = opened(remote[1], tmp_path / "cache")
        assert data[0]["latent"][0, 0, 0, 0] == 0 and data[3]["latent"][0, 0, 0, 0] == 3
        assert len(fetched) == expected
    copy = tmp_path / "cache/train-00000.parquet"
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert opened(remote[1], tmp_path / "cache")[0]["latent"][0, 0, 0, 0] == 0
    assert len(fetched) == 2


def test_the_cache_keeps_to_its_bound_and_drops_the_longest_unused(
    remote: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = remote
    manifest = Manifest.load(folder)
    assert manifest is not None
    shards, size = manifest.shards, manifest.shards[0].bytes
    cache = tmp_path / "cache"
    cache.mkdir()
    store = Store(cache, url, int(2.5 * size))
    for number, age in ((0, 1), (1, 2), (0, 3), (2, 4)):
        os.utime(store.get(shards[number]), (age, age))
    assert {p.name for p in cache.glob("*.parquet")} == {shards[0].file, shards[2].file}
    data = opened(url, cache, cache_gb=2.5 * size / 1e9, window=2)
    for step in range(12):
        for index in data.schedule(2, 0).indices(step):
            assert data[index]["latent"][0, 0, 0, 0] == index
        assert sum(p.stat().st_size for p in cache.glob("*.parquet")) <= 2.5 * size


def test_a_cache_that_cannot_hold_the_window_is_refused(
    remote: tuple[Path, str], tmp_path: Path
) -> None:
    for window, said in ((None, "all shards"), (3, "the 3 shards of data.window")):
        with pytest.raises(Refusal, match=rf"data\.cache_gb.*{said}"):
            opened(remote[1], tmp_path / "cache", cache_gb=3e-6, window=window)


def test_an_outage_is_refused_and_quarantines_nothing(
    remote: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(remote[1], tmp_path / "cache", quarantine=tmp_path / "quarantine.jsonl")
    calls = []

    def fail(*args: object) -> None:
        calls.append(1)
        raise ConnectionError("no route to host")

    files = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(files, "get_file", fail)
    with pytest.raises(Refusal, match=r"data\.dir=memory.*ConnectionError: no route"):
        data[0]
    assert len(calls) == 3 and not (tmp_path / "quarantine.jsonl").exists()
    monkeypatch.undo()
    assert data[0]["index"] == 0


def test_a_short_outage_is_sat_out_with_a_new_connection_and_no_secret_is_logged(
    remote: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, opened_for = opened(remote[1], tmp_path / "cache"), []
    files = type(fsspec.filesystem("memory"))
    get_file, open_url = files.get_file, fsspec.core.url_to_fs

    def fail_once(self: object, *args: object) -> None:
        if len(opened_for) == 1:
            raise ConnectionError("https://me:hush@host/bucket?token=hush refused")
        get_file(self, *args)

    def counted(url: str, **options: object) -> object:
        opened_for.append(url)
        return open_url(url, **options)

    monkeypatch.setattr(files, "get_file", fail_once)
    monkeypatch.setattr(fsspec.core, "url_to_fs", counted)
    store_module._opened.clear()
    assert [data[index]["index"] for index in (0, 4, 8, 12)] == [0, 4, 8, 12]
    assert len(opened_for) == 2  # one connection for all shards, and the one after the outage
    assert "again in 0 s" in caplog.text and "hush" not in caplog.text


def test_a_transfer_that_is_damaged_once_is_repeated(
    remote: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = remote
    manifest = Manifest.load(folder)
    assert manifest is not None
    transfer, times = store_module.transfer, []

    def noisy(place: str, path: Path, size: int) -> None:
        transfer(place, path, size)
        times.append(1)
        if len(times) == 1:
            path.write_bytes(b"x" + path.read_bytes()[1:])

    monkeypatch.setattr(store_module, "transfer", noisy)
    (tmp_path / "cache").mkdir()
    path = Store(tmp_path / "cache", url).get(manifest.shards[0])
    assert manifest.shards[0].difference(path.parent) is None and len(times) == 2


def test_a_shard_that_is_not_there_or_of_another_size_is_bad_data(
    remote: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = remote
    manifest = Manifest.load(folder)
    assert manifest is not None
    (tmp_path / "cache").mkdir()
    files, store = fsspec.filesystem("memory"), Store(tmp_path / "cache", url)
    files.rm(f"/bucket/data/{manifest.shards[0].file}")
    files.pipe(f"/bucket/data/{manifest.shards[1].file}", b"short")
    for shard, said in zip(manifest.shards, ("missing", "5 bytes instead of"), strict=False):
        with pytest.raises(BadData, match=said):
            store.get(shard)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://bucket/nowhere", "a place with manifest.json"),
        ("nosuch://bucket/data", "a protocol whose fsspec package is installed"),
        ("memory://me:secret@bucket/data", "a place with manifest.json"),
    ],
)
def test_a_place_without_data_is_refused_in_one_line(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        mirror(url, tmp_path / "cache")
    assert "secret" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_hub_is_a_protocol_that_is_known() -> None:
    """Nothing is fetched: only the file system's class is looked up."""
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
