"""The stopwatch: median, 20-80 % spread and peak memory of a run on the GPU."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_REPEATS = 5
MIN_MS = 80.0
MAX_REPEATS = 1000
_WARM_UP_MS = 15.0
_FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
_FLUSH_MS = 0.08  # at the least, on an H100


@dataclass(frozen=True)
class Timing:
    median_ms: float
    low_ms: float  # 20 % quantile
    high_ms: float  # 80 % quantile
    repeats: int
    peak_bytes: int  # allocated above the inputs
    host_ms: float  # the calls alone, while the GPU has nothing to do


class Stopwatch(Protocol):
    def mark(self) -> None:
        """Count memory from here: what is allocated now are the inputs."""

    def time(self, run: Callable[[], object]) -> Timing:
        """Time runs until there are MIN_REPEATS and they took MIN_MS, or are MAX_REPEATS."""


class CudaStopwatch:
    """Times with CUDA events; the L2 cache is flushed before every run.

    The flush lasts until all of the run is queued, as in a model whose other layers keep the GPU
    busy: what is timed is the GPU's work, and the host's is told beside it.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._inputs = 0

    def mark(self) -> None:
        torch.cuda.synchronize()
        self._inputs = torch.cuda.memory_allocated()

    def time(self, run: Callable[[], object]) -> Timing:
        run()  # compiles
        torch.cuda.reset_peak_memory_stats()
        host_ms = statistics.median(self._host_ms(run) for _ in range(MIN_REPEATS))
        flushes = 1 + math.ceil(2 * host_ms / _FLUSH_MS)
        (estimate,) = self._times(run, 1, flushes)
        peak = torch.cuda.max_memory_allocated() - self._inputs
        self._times(run, min(int(_WARM_UP_MS / estimate), MAX_REPEATS), flushes)
        times: list[float] = []
        while len(times) < MIN_REPEATS or (sum(times) < MIN_MS and len(times) < MAX_REPEATS):
            missing = math.ceil((MIN_MS - sum(times)) / estimate)
            repeats = max(min(missing, MAX_REPEATS - len(times)), MIN_REPEATS - len(times), 1)
            times += self._times(run, repeats, flushes)
        return summarise(times, peak, host_ms)

    def _host_ms(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    def _times(self, run: Callable[[], object], repeats: int, flushes: int) -> list[float]:
        starts, ends = (
            [torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)
        )
        for start, end in zip(starts, ends, strict=True):
            for _ in range(flushes):
                self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def summarise(times: list[float], peak_bytes: int, host_ms: float) -> Timing:
    """Return the quantiles of at least two times in ms."""
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    median = statistics.median(times)
    return Timing(median, quantiles[0], quantiles[-1], len(times), peak_bytes, host_ms)
