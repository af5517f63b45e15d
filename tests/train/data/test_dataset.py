"""Reading verified shards back, and the exact order of batches."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gossamer.train.codec import PCACodec
from gossamer.train.data import dataset as dataset_module
from gossamer.train.data.dataset import BatchSchedule, LatentDataset, batches
from gossamer.train.data.encode import encode
from gossamer.train.data.shards import Manifest, from_bytes, to_bytes
from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords


@pytest.fixture
def data(make_video: Callable, tmp_path: Path) -> Path:
    video = make_video(tmp_path / "film.mp4", (20, 8))
    video.with_suffix(".txt").write_text("a square")
    encode(
        video,
        tmp_path / "data",
        codec=PCACodec(channels=12),
        text=HashedWords(dim=8, length=6),
        height=32,
        width=48,
        frames=4,
        stride=2,
        rows_per_shard=4,
    )
    return tmp_path / "data"


def test_items_have_the_documented_shapes_and_the_padded_text(data: Path) -> None:
    train = LatentDataset(data, "train")
    assert len(train) == 9 and len(LatentDataset(data, "heldout")) == 3
    item = train[4]
    assert item["latent"].shape == item["condition"].shape == (12, 2, 8, 12)
    assert item["latent"].dtype == torch.float32 and item["index"] == 4
    expected = HashedWords(dim=8, length=6).encode(["a square"])[0]
    torch.testing.assert_close(item["text"], expected, atol=4e-3, rtol=0)
    meta = train.meta(4)
    assert meta["prompt"] == "a square" and meta["start"] == 8 and "latent" not in meta


def test_reading_row_by_row_gives_the_same_items(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = LatentDataset(data, "train")
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(dataset_module, "MOST_OPEN", 2)
    one_by_one = LatentDataset(data, "train")
    for index in (8, 0, 3, 4, 5, 8, 1):
        for name, value in in_memory[index].items():
            assert torch.equal(torch.as_tensor(one_by_one[index][name]), torch.as_tensor(value))
    assert one_by_one.meta(5) == in_memory.meta(5)


def test_a_flipped_byte_anywhere_in_a_shard_names_the_shard(data: Path) -> None:
    path = data / "train-00001.parquet"
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match=r"train-00001\.parquet: SHA-256"):
            LatentDataset(data, "train")
        LatentDataset(data, "heldout")
    path.write_bytes(content[:-9])
    with pytest.raises(Refusal, match=r"train-00001\.parquet"):
        LatentDataset(data, "train")
    path.unlink()
    with pytest.raises(Refusal, match=r"train-00001\.parquet: missing"):
        LatentDataset(data, "train")


def test_a_folder_without_manifest_or_split_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="gossamer encode"):
        LatentDataset(tmp_path, "train")
    with pytest.raises(Refusal, match=r"split=test.*heldout or train"):
        LatentDataset(data, "test")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(Refusal, match="format 99"):
        LatentDataset(data, "train")
    (data / "manifest.json").write_text("{")
    with pytest.raises(Refusal, match="unreadable"):
        LatentDataset(data, "train")


def test_a_latent_with_nan_names_its_clip(data: Path) -> None:
    """The planted shard is listed with its true SHA-256: only the finite check can find it."""
    import hashlib
    from dataclasses import replace

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = data / "heldout-00000.parquet"
    table = pq.read_table(path)
    planted = table.to_pylist()
    latent = from_bytes(planted[1]["latent"], planted[1]["latent_shape"])
    latent[0, 0, 0, 0] = float("nan")
    planted[1]["latent"] = to_bytes(latent)
    pq.write_table(pa.Table.from_pylist(planted, schema=table.schema), path)
    manifest = Manifest.load(data)
    assert manifest is not None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    shards = [
        s if s.file != path.name else replace(s, sha256=digest, bytes=path.stat().st_size)
        for s in manifest.shards
    ]
    replace(manifest, shards=shards).save(data)
    held = LatentDataset(data, "heldout")
    held[0]
    with pytest.raises(Refusal, match=rf"latent of clip {planted[1]['clip_id']}"):
        held[1]


def order(schedule: BatchSchedule, steps: int) -> list[int]:
    return [index for step in range(steps) for index in schedule.indices(step)]


def test_every_epoch_uses_each_sample_once_in_a_new_order() -> None:
    schedule = BatchSchedule(num_samples=12, global_batch=4, seed=5)
    flat = order(schedule, 9)
    epochs = [flat[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert schedule.indices(0) != BatchSchedule(12, 4, seed=6).indices(0)


def test_a_batch_larger_than_the_data_wraps_over_epochs() -> None:
    flat = order(BatchSchedule(num_samples=3, global_batch=7), 6)
    assert all(sorted(flat[start : start + 3]) == [0, 1, 2] for start in range(0, 42, 3))


@pytest.mark.parametrize(
    ("world", "micro", "workers"), [(1, 4, 0), (2, 1, 0), (4, None, 0), (2, 2, 2)]
)
def test_batches_do_not_depend_on_ranks_workers_or_the_resume_point(
    data: Path, world: int, micro: int | None, workers: int
) -> None:
    train = LatentDataset(data, "train")
    schedule = BatchSchedule(len(train), global_batch=4, seed=1)
    for start in (0, 2):
        parts = [
            [
                batch["index"].tolist()
                for batch in batches(
                    train, schedule, start_step=start, num_steps=3, rank=rank, world=world,
                    micro_batch=micro, num_workers=workers,
                )
            ]
            for rank in range(world)
        ]  # fmt: skip
        per_step = len(parts[0]) // 3
        for number in range(3):
            pieces = [part[number * per_step : (number + 1) * per_step] for part in parts]
            joined = [index for rank in pieces for batch in rank for index in batch]
            assert joined == schedule.indices(start + number)


def test_collated_batches_hold_the_items(data: Path) -> None:
    train = LatentDataset(data, "train")
    batch = next(batches(train, BatchSchedule(len(train), 2), num_steps=1))
    for row, index in enumerate(batch["index"].tolist()):
        assert torch.equal(batch["latent"][row], train[index]["latent"])
    assert batch["text"].shape == (2, 6, 8)


def test_batches_that_do_not_divide_are_refused(data: Path) -> None:
    train = LatentDataset(data, "train")
    with pytest.raises(Refusal, match="multiple of 3 ranks"):
        batches(train, BatchSchedule(9, 4), world=3)
    with pytest.raises(Refusal, match="divisor of 4"):
        batches(train, BatchSchedule(9, 4), micro_batch=3)
    with pytest.raises(Refusal, match="num_samples"):
        BatchSchedule(0, 4)


class _Dying(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> dict:
        os.kill(os.getpid(), 9)
        return {}


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RuntimeError, match="worker"):
        next(batches(_Dying(), BatchSchedule(4, 2), num_workers=1))
