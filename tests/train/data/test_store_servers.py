"""Shards from a local S3 server and a local Cloud Storage one, which CI has not.

Needs `pip install s3fs moto[server] gcsfs gcp-storage-emulator`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.train.data import store as store_module
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.data.store import mirror
from gossamer.train.refusal import Refusal

SECRET = "hush-hush-42"


def s3(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], None]]:
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return s3fs.S3FileSystem(skip_instance_cache=True), server.stop


def gs(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], None]]:
    gcsfs, emulator = pytest.importorskip("gcsfs"), pytest.importorskip("gcp_storage_emulator")
    assert emulator
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", 0, in_memory=True)
    server.start()
    port = server._api._httpd.socket.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    return gcsfs.GCSFileSystem(skip_instance_cache=True), server.stop


@pytest.fixture(params=[s3, gs], ids=["s3", "gs"])
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Any, Callable[[], None]]]:
    """Yield the protocol of a local server, its file system, and what stops it."""
    files, stop = request.param(monkeypatch)
    monkeypatch.setattr(store_module, "WAITS", (0.0,))
    monkeypatch.setattr(store_module, "OUTAGE", (0.0,))
    store_module._opened.clear()
    yield request.param.__name__, files, stop
    store_module._opened.clear()
    stop()


def test_a_bucket_gives_the_items_of_the_folder_and_its_faults_are_told(
    server: tuple[str, Any, Callable[[], None]], make_data: Callable, tmp_path: Path
) -> None:
    protocol, bucket, stop = server
    folder, cache = make_data(tmp_path / "local", shards=25), tmp_path / "cache"
    bucket.mkdir("bucket")
    bucket.put(f"{folder}/", "bucket/film/", recursive=True)
    content = bytearray(bucket.cat_file("bucket/film/train-00003.parquet"))
    content[len(content) // 2] ^= 1
    bucket.pipe_file("bucket/film/train-00003.parquet", bytes(content))
    url = f"{protocol}://bucket/film"
    mirror(url, cache)
    listed = tmp_path / "quarantine.jsonl"
    local, data = (
        LatentDataset(where, "train", url=place, quarantine=file)
        for where, place, file in ((folder, None, None), (cache, url, listed))
    )
    assert torch.equal(local[23]["latent"], data[23]["latent"]) and not listed.exists()
    assert data[12]["index"] != 12 and "train-00003.parquet" in listed.read_text()
    with pytest.raises(Refusal, match=r"nobucket/film: allowed is a place with manifest\.json"):
        mirror(f"{protocol}://nobucket/film", tmp_path / "other")
    stop()
    with pytest.raises(Refusal, match=r"a place that can be read") as refusal:
        data[99]
    assert SECRET not in str(refusal.value) and "\n" not in str(refusal.value)
    assert listed.read_text().count("\n") == 1
