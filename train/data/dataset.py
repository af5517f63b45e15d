"""Encoded shards -> training items, and an exact, stateless order of batches."""

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gossamer.train.data.shards import MANIFEST, Manifest, from_bytes
from gossamer.train.interrupt import leave_to_parent
from gossamer.train.refusal import Refusal

if TYPE_CHECKING:
    import datasets

IN_MEMORY_BYTES = 2**30  # larger splits are memory-mapped from a cache inside the data folder
HEAVY = ("latent", "condition", "text")


class LatentDataset(Dataset):
    """One split of an encoded folder; every shard's SHA-256 is checked when it is opened.

    Item: latent fp32 [C, f, h, w], condition likewise where stored, text fp32 [L, dim], index int.
    """

    def __init__(self, data_dir: str | Path, split: str) -> None:
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
        manifest.verify(folder)
        self.manifest, self.split = manifest, split
        files = [folder / shard.file for shard in manifest.shards if shard.split == split]
        self._rows = _open(files, folder)
        self.prompts: list[str] = list(self._rows["prompt"])
        light = [name for name in self._rows.column_names if name not in HEAVY]
        self._meta = self._rows.select_columns(light)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = self._rows[index]
        tensors = {
            name: from_bytes(row[name], row[f"{name}_shape"])
            for name in HEAVY
            if row[f"{name}_shape"]
        }
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise Refusal(
                    f"{name} of clip {row['clip_id']}",
                    "NaN or Inf",
                    "finite numbers",
                    "encode again",
                )
        text = torch.zeros(self.manifest.text["length"], self.manifest.text["dim"])
        text[: len(tensors["text"])] = tensors["text"]
        return {**tensors, "text": text, "index": index}

    def evenly(self, count: int) -> "LatentDataset":
        """Return a split of only so many of the items, evenly spaced."""
        some = copy(self)
        count = min(count, len(self))
        chosen = [int((i + 0.5) * len(self) / count) for i in range(count)]
        some._rows, some._meta = self._rows.select(chosen), self._meta.select(chosen)
        some.prompts = [self.prompts[i] for i in chosen]
        return some

    def meta(self, index: int) -> dict:
        """The columns of a row that are not tensors."""
        return self._meta[index]


@dataclass(frozen=True)
class BatchSchedule:
    """Which samples each step uses: a seeded permutation per epoch, cut into global batches.

    A pure function of the step, so that resuming needs no state and the number of ranks does not
    matter. A batch may run over the end of an epoch.
    """

    num_samples: int
    global_batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "global_batch"):
            if getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), ">= 1", "give at least one")

    def indices(self, step: int) -> list[int]:
        """The samples of the global batch of a step (from 0)."""
        first = step * self.global_batch
        epochs: dict[int, list[int]] = {}
        chosen = []
        for place in range(first, first + self.global_batch):
            epoch, offset = divmod(place, self.num_samples)
            if epoch not in epochs:
                epochs[epoch] = self._permutation(epoch)
            chosen.append(epochs[epoch][offset])
        return chosen

    def _permutation(self, epoch: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.randperm(self.num_samples, generator=generator).tolist()


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack items; `index` becomes int64 [B]."""
    batch = {
        name: torch.stack([item[name] for item in items]) for name in items[0] if name != "index"
    }
    batch["index"] = torch.tensor([item["index"] for item in items])
    return batch


def batches(
    dataset: Dataset,
    schedule: BatchSchedule,
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
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
    )
    return iter(loader)


@dataclass(frozen=True)
class _RankBatches:
    """The batch sampler: micro-batches of one rank's contiguous part of each global batch."""

    schedule: BatchSchedule
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


def _open(files: list[Path], folder: Path) -> "datasets.Dataset":
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        tables = [pq.read_table(file, page_checksum_verification=True) for file in files]
        return datasets.Dataset(pa.concat_tables(tables))
    # named by the manifest, so that data encoded again never meets an old cache
    cache = folder / ".cache" / hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache))
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
