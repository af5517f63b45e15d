"""The cut detector: split a video into shots, and tell how much each moves (spec/data.md, 1.2)."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BINS = 32
CUT_HISTOGRAM = 0.5  # L1 distance of normalised histograms, 0 to 2
CUT_CHANGE = 12.0  # mean absolute grey difference that a histogram cut needs as well
CUT_CHANGE_ALONE = 35.0  # and the one that is a cut by itself


@dataclass(frozen=True)
class Shot:
    """Frames start to end (exclusive); motion is the mean absolute grey difference, 0 to 255."""

    start: int
    end: int
    motion: float


class ChangeMeter:
    """Collects, frame by frame, how far each frame is from the one before."""

    def __init__(self) -> None:
        self._grey: np.ndarray | None = None
        self._histogram: np.ndarray | None = None
        self._distances: list[float] = []
        self._changes: list[float] = []

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame, uint8 [H, W, 3]."""
        grey = frame.mean(axis=2, dtype=np.float32)
        histogram = np.bincount((grey / (256 / BINS)).astype(np.int64).ravel(), minlength=BINS)
        if self._grey is not None and self._histogram is not None:
            self._distances.append(float(np.abs(histogram - self._histogram).sum() / grey.size))
            self._changes.append(float(np.abs(grey - self._grey).mean()))
        self._grey, self._histogram = grey, histogram

    def signals(self) -> tuple[np.ndarray, np.ndarray]:
        """Histogram distance and mean absolute difference, each [frames - 1]."""
        return np.array(self._distances), np.array(self._changes)


def find_shots(histogram_distance: np.ndarray, change: np.ndarray) -> list[Shot]:
    """Cut where both signals jump, or where the change alone is extreme."""
    both = (histogram_distance > CUT_HISTOGRAM) & (change > CUT_CHANGE)
    cuts = np.flatnonzero(both | (change > CUT_CHANGE_ALONE)) + 1
    bounds = [0, *cuts.tolist(), len(change) + 1]
    return [
        Shot(start, end, float(change[start : end - 1].mean()) if end - start > 1 else 0.0)
        for start, end in pairwise(bounds)
    ]
