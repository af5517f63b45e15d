"""Which samples each step uses: pure functions of the step, so that resuming needs no state."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from gossamer.train.refusal import Refusal


class Schedule(Protocol):
    """Gives the samples of each global batch."""

    @property
    def global_batch(self) -> int: ...

    def indices(self, step: int) -> list[int]:
        """Return the samples of the global batch of a step (from 0)."""


@dataclass(frozen=True)
class BatchSchedule:
    """A seeded permutation per epoch, cut into global batches.

    A pure function of the step: the number of ranks does not matter either. A batch may run over
    the end of an epoch. With `window`, the samples lie in `runs` (shards) of those lengths, and
    only so many runs are shuffled together, in a new order each epoch: few shards are open at once.
    """

    num_samples: int
    global_batch: int
    seed: int = 0
    runs: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "global_batch"):
            if getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), ">= 1", "give at least one")

    def indices(self, step: int) -> list[int]:
        """The samples of the global batch of a step (from 0)."""
        first = step * self.global_batch
        chosen: list[int] = []
        while len(chosen) < self.global_batch:
            epoch, offset = divmod(first + len(chosen), self.num_samples)
            stop = offset + self.global_batch - len(chosen)
            chosen += _permutation(self, epoch)[offset:stop].tolist()
        return chosen


@dataclass(frozen=True)
class BucketSchedule:
    """Global batches of one bucket each; the buckets come in shuffled turns.

    In each round a bucket has as many batches as its samples fill, the last perhaps with the first
    ones of its next epoch. `buckets` are runs of samples (first, length); each is a BatchSchedule
    of its own, and a single one is just that.
    """

    buckets: tuple[tuple[tuple[int, int], ...], ...]
    global_batch: int
    seed: int = 0
    window: int | None = None

    @cached_property
    def _parts(self) -> list[BatchSchedule]:
        lengths = [tuple(length for _, length in runs) for runs in self.buckets]
        return [
            BatchSchedule(sum(runs), self.global_batch, self.seed, runs, self.window)
            for runs in lengths
        ]

    @cached_property
    def _turns(self) -> list[int]:
        """The bucket of each batch of a round, before it is shuffled."""
        batches = [-(-part.num_samples // self.global_batch) for part in self._parts]
        return [bucket for bucket, count in enumerate(batches) for _ in range(count)]

    def bucket(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many batches it has had before."""
        turn, place = divmod(step, len(self._turns))
        order = torch.randperm(len(self._turns), generator=_generator(f"{self.seed}:turns:{turn}"))
        taken = [self._turns[i] for i in order[: place + 1].tolist()]
        bucket = taken[-1]
        return bucket, turn * self._turns.count(bucket) + taken.count(bucket) - 1

    def indices(self, step: int) -> list[int]:
        """The samples of the global batch of a step (from 0)."""
        bucket, count = (0, step) if len(self.buckets) == 1 else self.bucket(step)
        runs = self.buckets[bucket]
        ends = list(accumulate(length for _, length in runs))
        chosen = []
        for place in self._parts[bucket].indices(count):
            run = bisect_right(ends, place)
            first, length = runs[run]
            chosen.append(first + place - (ends[run] - length))
        return chosen


@lru_cache(maxsize=16)
def _permutation(schedule: BatchSchedule, epoch: int) -> Tensor:
    generator = _generator(f"{schedule.seed}:{epoch}")
    runs, window = schedule.runs, schedule.window
    if window is None or window >= len(runs):
        return torch.randperm(schedule.num_samples, generator=generator)
    starts = [0, *accumulate(runs)]
    order = torch.randperm(len(runs), generator=generator).tolist()
    parts = []
    for first in range(0, len(order), window):
        together = order[first : first + window]
        samples = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in together])
        parts.append(samples[torch.randperm(len(samples), generator=generator)])
    return torch.cat(parts)


def _generator(words: str) -> torch.Generator:
    digest = hashlib.sha256(words.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
