"""The order of samples: a pure function of the step, in windows of shards and in buckets."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gossamer.train.data.dataset import LatentDataset, batches
from gossamer.train.data.schedule import BatchSchedule, BucketSchedule


def order(schedule: BatchSchedule | BucketSchedule, steps: int) -> list[int]:
    return [index for step in range(steps) for index in schedule.indices(step)]


def test_the_permutation_of_an_epoch_is_the_one_it_always_was() -> None:
    """A run that was begun by an earlier version goes on in its order."""
    digest = hashlib.sha256(b"5:1").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    expected = torch.randperm(12, generator=generator).tolist()
    assert order(BatchSchedule(12, 4, seed=5), 6)[12:] == expected
    one_bucket = BucketSchedule((((0, 5), (5, 7)),), 4, seed=5)
    assert order(one_bucket, 6) == order(BatchSchedule(12, 4, seed=5), 6)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_opens_few_shards_and_uses_each_sample_once_an_epoch(window: int) -> None:
    runs = (5, 3, 4, 4, 2, 6)
    schedule = BatchSchedule(24, 4, seed=1, runs=runs, window=window)
    shard = [number for number, length in enumerate(runs) for _ in range(length)]
    epochs = [order(schedule, 12)[:24], order(schedule, 12)[24:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
        # shards in the order they first appear: a new group only begins after the one before ended
        turns = list(dict.fromkeys(shard[i] for i in epoch))
        place = [turns.index(shard[i]) // window for i in epoch]
        assert place == sorted(place)
    assert epochs[0] != epochs[1]
    assert [shard[i] for i in epochs[0]] != [shard[i] for i in epochs[1]]


def test_every_batch_is_of_one_bucket_and_all_clips_get_their_turn() -> None:
    buckets = (((0, 10), (30, 5)), ((10, 20),), ((35, 3),))
    schedule = BucketSchedule(buckets, 4, seed=2)
    members = [{i for first, n in runs for i in range(first, first + n)} for runs in buckets]
    per_round = 4 + 5 + 1  # batches that 15, 20 and 3 clips fill
    seen: Counter[int] = Counter()
    for step in range(3 * per_round):
        bucket, count = schedule.bucket(step)
        chosen = schedule.indices(step)
        assert len(chosen) == 4 and set(chosen) <= members[bucket]
        assert count == sum(schedule.bucket(s)[0] == bucket for s in range(step))
        seen.update(chosen)
    assert set(seen) == set(range(38))
    assert all(3 <= seen[i] <= 4 for i in members[0] | members[1] | members[2])
    turns = [[schedule.bucket(r * per_round + i)[0] for i in range(per_round)] for r in range(3)]
    assert turns[0] != turns[1] and all(Counter(t) == {0: 4, 1: 5, 2: 1} for t in turns)


@pytest.mark.parametrize(
    ("world", "micro", "workers", "start"),
    [(1, 4, 0, 0), (2, 1, 0, 2), (4, None, 0, 5), (2, 2, 4, 3)],
)
def test_streamed_buckets_do_not_depend_on_ranks_workers_or_the_resume_point(
    make_data: Callable, tmp_path: Path, world: int, micro: int | None, workers: int, start: int
) -> None:
    folder = make_data(tmp_path / "data", shards=6, shapes=((2, 2, 4, 4), (2, 1, 6, 2)))
    parts = []
    for rank in range(world):
        # each rank has a cache of its own, as on machines of their own
        own = tmp_path / f"cache-{rank}"
        own.mkdir()
        (own / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
        data = LatentDataset(own, "train", url=f"file://{folder}", window=2)
        schedule = data.schedule(4, seed=3)
        loaded = batches(
            data, schedule, start_step=start, num_steps=3, rank=rank, world=world,
            micro_batch=micro, num_workers=workers if rank == 0 else 0,
        )  # fmt: skip
        parts.append(list(loaded))
    per_step = len(parts[0]) // 3
    for number in range(3):
        pieces = [batch for part in parts for batch in part[number * per_step :][:per_step]]
        joined = [index for batch in pieces for index in batch["index"].tolist()]
        assert joined == schedule.indices(start + number)
        assert len({batch["latent"].shape[1:] for batch in pieces}) == 1
        for batch in pieces:
            assert batch["latent"].flatten(1)[:, 0].tolist() == batch["index"].tolist()
