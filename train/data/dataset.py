"""Encoded shards -> training items, and this rank's batches in the order of a schedule."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gossamer.train.data.clips import evenly
from gossamer.train.data.quarantine import BadData, Quarantine
from gossamer.train.data.reader import OpenShard
from gossamer.train.data.schedule import BatchSchedule, BucketSchedule, Schedule
from gossamer.train.data.shards import MANIFEST, Manifest, Shard, from_bytes
from gossamer.train.data.store import Store
from gossamer.train.interrupt import leave_to_parent
from gossamer.train.noise import mix
from gossamer.train.refusal import Refusal

__all__ = ["BatchSchedule", "LatentDataset", "batches", "collate", "schedule_of"]

IN_MEMORY_BYTES = 2**30  # splits of a local folder up to this size are read whole
MOST_OPEN = 16  # shards
HEAVY = ("latent", "condition", "text")


class LatentDataset(Dataset):
    """One split of an encoded folder, or of a URL by way of a folder.

    Item: latent fp32 [C, f, h, w], condition likewise where stored, text fp32 [L, dim], index int.
    A shard's SHA-256 is checked when a process opens it. In the place of damaged clips come others
    of their size, chosen by their index alone, so that every process and resume agrees on them;
    those left out are listed in `quarantine`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        *,
        url: str | None = None,
        cache_gb: float | None = None,
        window: int | None = None,
        quarantine: Path | None = None,
    ) -> None:
        folder = Path(data_dir)
        manifest = Manifest.load(folder)
        if manifest is None:
            raise Refusal(
                "data_dir",
                folder,
                f"a folder with {MANIFEST}",
                "run gossamer encode out_dir=<data_dir> first",
            )
        if split not in manifest.splits:
            raise Refusal(
                "split",
                split,
                " or ".join(manifest.splits),
                "encode again with another holdout, or name one",
            )
        self.manifest, self.split, self.window = manifest, split, window
        self.shards = [shard for shard in manifest.shards if shard.split == split]
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._store = Store(folder, url, None if cache_gb is None else int(cache_gb * 1e9))
        if self._store.cache_bytes is not None:
            _check_cache(self.shards, self._store.cache_bytes, window)
        self.quarantine = Quarantine(quarantine, folder, split, len(self))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._checked: set[int] = set()
        self._most_open = MOST_OPEN
        if url is None and sum(_size(folder, shard) for shard in self.shards) <= IN_MEMORY_BYTES:
            self._read_all()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for candidate in self._candidates(index):
            shard = self._shard_of(candidate)
            row = candidate - self._first(shard)
            name, rows = self.shards[shard].file, self.shards[shard].rows
            if self.quarantine.holds(name, row):
                continue
            try:
                return {**self._tensors(self._row(shard, row)), "index": candidate}
            except BadData as error:
                self.quarantine.add(name, row, rows, error)
        raise Refusal("data.dir", self._store.folder, "whole clips of each size", "encode again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def of_run(self, quarantine: Path) -> Self:
        """Return the split as another run has it: what is read is shared, its list is its own."""
        other = copy(self)
        other._open = self._open
        other.quarantine = Quarantine(quarantine, self._store.folder, self.split, len(self))
        return other

    def evenly(self, count: int) -> "SomeClips":
        """Return a split of only so many of the items, evenly spaced."""
        if len(self.buckets) > 1:
            raise Refusal("training_data.clips", count, "null for data of several sizes", "null it")
        return SomeClips(self, evenly(range(len(self)), count))

    def meta(self, index: int) -> dict:
        """The columns of a row that are not tensors."""
        shard = self._shard_of(index)
        row = self._row(shard, index - self._first(shard))
        return {name: value for name, value in row.items() if name not in HEAVY}

    @property
    def buckets(self) -> dict[tuple[int, ...], list[range]]:
        """Latent shape -> the runs of clips that have it, one a shard; () in data of one size."""
        found: dict[tuple[int, ...], list[range]] = {}
        for number, shard in enumerate(self.shards):
            run = range(self._first(number), self._ends[number])
            found.setdefault(tuple(shard.latent_shape), []).append(run)
        return found

    @property
    def largest(self) -> list[int]:
        """The clips of the largest latents."""
        buckets = self.buckets
        return [index for run in buckets[max(buckets, key=prod)] for index in run]

    def shape(self, index: int) -> tuple[int, ...]:
        """The latent shape of a clip."""
        stored = self.shards[self._shard_of(index)].latent_shape
        return tuple(stored or self.meta(index)["latent_shape"])

    def runs(self, indices: range | list[int], most: int) -> list[list[int]]:
        """Cut indices into runs of one latent shape, of at most `most`."""
        groups = [list(run) for _, run in groupby(indices, self._bucket)]
        return [run[i : i + most] for run in groups for i in range(0, len(run), most)]

    def schedule(self, global_batch: int, seed: int) -> BucketSchedule:
        """The order of the training: batches of one size each."""
        runs = tuple(tuple((r.start, len(r)) for r in rs) for rs in self.buckets.values())
        return BucketSchedule(runs, global_batch, seed, self.window)

    def _bucket(self, index: int) -> tuple[int, ...]:
        return tuple(self.shards[self._shard_of(index)].latent_shape)

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect_right(self._ends, index)

    def _first(self, shard: int) -> int:
        return self._ends[shard] - self.shards[shard].rows

    def _candidates(self, index: int) -> Iterator[int]:
        """The index, then others of its size: a fixed sequence, that of another index differs."""
        yield index
        runs = self.buckets[self._bucket(index)]
        ends = list(accumulate(map(len, runs)))
        for attempt in range(20 * ends[-1]):
            place = mix(index, attempt) % ends[-1]
            run = bisect_right(ends, place)
            yield runs[run][place - ends[run]]

    def _read_all(self) -> None:
        self._most_open = len(self.shards)
        for number, shard in enumerate(self.shards):
            try:
                if not self.quarantine.holds(shard.file, 0):
                    self._opened(number).read_all()
            except BadData as error:
                self.quarantine.add(shard.file, 0, shard.rows, BadData(str(error)))

    def _row(self, shard: int, row: int) -> dict[str, Any]:
        return self._opened(shard).row(row)

    def _opened(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        path = self._store.folder / shard.file
        # again after it was closed: a file of the cache may be gone meanwhile
        if number not in self._checked or not path.is_file():
            path = self._store.get(shard)
            self._checked.add(number)
        self._open[number] = OpenShard(path, shard)
        while len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return self._open[number]

    def _tensors(self, row: dict[str, Any]) -> dict[str, Tensor]:
        clip = row["clip_id"]
        tensors = {}
        for name in HEAVY:
            if not row[f"{name}_shape"]:
                continue
            try:
                tensors[name] = from_bytes(row[name], row[f"{name}_shape"])
            except (RuntimeError, ValueError) as error:
                raise BadData(f"{name} of clip {clip}: {error}", one_clip=True) from error
            if not tensors[name].isfinite().all():
                raise BadData(f"{name} of clip {clip}: NaN or Inf", one_clip=True)
        text = torch.zeros(self.manifest.text["length"], self.manifest.text["dim"])
        own = tensors.get("text", text)
        if "latent" not in tensors or own.ndim != 2 or len(own) > len(text):
            raise BadData(f"shapes of clip {clip} are not the manifest's", one_clip=True)
        text[: len(own)] = own
        return {**tensors, "text": text}


class SomeClips(Subset):
    """Some items of a split of one size; `index`, as `meta` takes it, is the place in the split."""

    dataset: LatentDataset

    @property
    def manifest(self) -> Manifest:
        return self.dataset.manifest

    @property
    def largest(self) -> list[int]:
        return list(range(len(self)))

    def meta(self, index: int) -> dict:
        return self.dataset.meta(index)


def _size(folder: Path, shard: Shard) -> int:
    path = folder / shard.file
    return shard.bytes or (path.stat().st_size if path.is_file() else 0)


def _check_cache(shards: list[Shard], cache_bytes: int, window: int | None) -> None:
    """Refuse a cache that would fetch the same shards again and again."""
    sizes = sorted((shard.bytes for shard in shards), reverse=True)
    needed = sum(sizes[:window])
    if needed > cache_bytes:
        of = f"the {window} shards of data.window" if window else "all shards (data.window=null)"
        raise Refusal(
            "data.cache_gb",
            cache_bytes / 1e9,
            f"at least {needed / 1e9:.3g}, for {of}",
            "raise it, or shuffle fewer shards together with data.window",
        )


def schedule_of(dataset: Any, global_batch: int, seed: int) -> Schedule:
    """Return the dataset's own order, or the plain one of a dataset without."""
    if isinstance(dataset, LatentDataset):
        return dataset.schedule(global_batch, seed)
    return BatchSchedule(len(dataset), global_batch, seed)


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack items; `index` becomes int64 [B]."""
    batch = {
        name: torch.stack([item[name] for item in items]) for name in items[0] if name != "index"
    }
    batch["index"] = torch.tensor([item["index"] for item in items])
    return batch


def batches(
    dataset: Dataset,
    schedule: Schedule,
    *,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
    num_workers: int = 0,
    num_steps: int | None = None,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches from `start_step` on, each global batch split evenly over ranks.

    Endless unless `num_steps` is given. `micro_batch` None takes the rank's share in one piece.
    `pin_memory` is for batches that go to a GPU.
    """
    share, rest = divmod(schedule.global_batch, world)
    if rest or share == 0:
        raise Refusal(
            "global_batch", schedule.global_batch, f"a multiple of {world} ranks", "change it"
        )
    micro = micro_batch or share
    if micro < 1 or share % micro:
        raise Refusal("micro_batch", micro, f"a divisor of {share} samples a rank", "change it")
    sampler = _RankBatches(schedule, start_step, num_steps, rank, share, micro)
    loader = DataLoader(
        _Carrier(dataset),
        batch_sampler=sampler,
        collate_fn=_collate_or_refusal,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
    )
    return _unwrapped(iter(loader))


class _Carrier(Dataset):
    """Brings a refusal out of a worker as what it is, not as a traceback in an error."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[dict] | Refusal:
        try:
            return [self._dataset[index] for index in indices]
        except Refusal as refusal:
            return refusal


def _collate_or_refusal(items: list[dict] | Refusal) -> dict[str, Tensor] | Refusal:
    return items if isinstance(items, Refusal) else collate(items)


def _unwrapped(loaded: Iterator[Any]) -> Iterator[dict[str, Tensor]]:
    for batch in loaded:
        if isinstance(batch, Refusal):
            raise batch
        yield batch


@dataclass(frozen=True)
class _RankBatches:
    """The batch sampler: micro-batches of one rank's contiguous part of each global batch."""

    schedule: Schedule
    start_step: int
    num_steps: int | None
    rank: int
    share: int
    micro: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            mine = self.schedule.indices(step)[
                self.rank * self.share : (self.rank + 1) * self.share
            ]
            for start in range(0, self.share, self.micro):
                yield mine[start : start + self.micro]
            step += 1
