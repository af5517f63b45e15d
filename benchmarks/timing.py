"""The stopwatch: median, 20-80 % spread and peak memory of a run on the GPU."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_REPEATS = 5
MIN_MS = 80.0
_WARM_UP_MS = 15.0
_FLUSH_BYTES = 256 << 20  # five times the L2 of an H100


@dataclass(frozen=True)
class Timing:
    median_ms: float
    low_ms: float  # 20 % quantile
    high_ms: float  # 80 % quantile
    repeats: int
    peak_bytes: int  # allocated above the inputs


class Stopwatch(Protocol):
    def mark(self) -> None:
        """Count memory from here: what is allocated now are the inputs."""

    def time(self, run: Callable[[], object]) -> Timing:
        """Time runs until there are MIN_REPEATS of them and they took MIN_MS."""


class CudaStopwatch:
    """Times with CUDA events; the L2 cache is flushed before every run."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._inputs = 0

    def mark(self) -> None:
        torch.cuda.synchronize()
        self._inputs = torch.cuda.memory_allocated()

    def time(self, run: Callable[[], object]) -> Timing:
        run()  # compiles
        torch.cuda.reset_peak_memory_stats()
        (estimate,) = self._times(run, 1)
        peak = torch.cuda.max_memory_allocated() - self._inputs
        self._times(run, int(_WARM_UP_MS / estimate))
        times: list[float] = []
        while len(times) < MIN_REPEATS or sum(times) < MIN_MS:
            missing = math.ceil((MIN_MS - sum(times)) / estimate)
            times += self._times(run, max(missing, MIN_REPEATS - len(times), 1))
        return summarise(times, peak)

    def _times(self, run: Callable[[], object], repeats: int) -> list[float]:
        starts, ends = (
            [torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)
        )
        for start, end in zip(starts, ends, strict=True):
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def summarise(times: list[float], peak_bytes: int) -> Timing:
    """Return the quantiles of at least two times in ms."""
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), quantiles[0], quantiles[-1], len(times), peak_bytes)
