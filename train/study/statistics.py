"""Bootstrap intervals over shots and seeds: clips of one shot are no independent evidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.train.study.data import Array

DRAWS = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def bootstrap(
    tables: Sequence[Array],
    shots: Sequence[str],
    statistic: Callable[..., float],
    *,
    draws: int = DRAWS,
) -> Estimate:
    """Return a statistic of tables [seed, clip] and its percentile interval.

    Each draw takes shots, with all their clips, and seeds with replacement: the same shots in every
    table, which pairs arms by clip, and the same seeds in tables of as many. Deterministic.
    """
    chance = np.random.default_rng(0)
    names = sorted(set(shots))
    members = [np.flatnonzero(np.asarray(shots) == name) for name in names]
    counts = sorted({len(table) for table in tables})
    found = []
    for _ in range(draws):
        clips = np.concatenate([members[i] for i in chance.integers(0, len(names), len(names))])
        seeds = {count: chance.integers(0, count, count) for count in counts}
        found.append(statistic(*(table[seeds[len(table)]][:, clips] for table in tables)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(found, [tail, 100 - tail])
    return Estimate(float(statistic(*tables)), float(low), float(high))


def mean(table: Array) -> float:
    return float(table.mean())


def ratio(a: Array, b: Array) -> float:
    return float(a.mean() / b.mean())


def difference(a: Array, b: Array) -> float:
    return float(a.mean() - b.mean())
