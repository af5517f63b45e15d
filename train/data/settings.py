"""The settings of an encode, checked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from gossamer.train.condition import CONDITIONS, Condition
from gossamer.train.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Everything that decides the rows, apart from the source, the codec and the text encoder.

    `buckets`, each frames, height and width in pixels, take the place of the one size.
    """

    height: int
    width: int
    frames: int
    buckets: tuple[tuple[int, int, int], ...] | None = None
    stride: int = 8
    fps: float | None = None
    holdout: float = 0.3
    min_motion: float = 0.3
    condition: Condition = "first_frame"
    augment: int = 0
    max_clips: int | None = None
    rows_per_shard: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "stride", "rows_per_shard"):
            self._require(name, getattr(self, name) >= 1, ">= 1", "give a positive whole number")
        sizes = self.sizes
        self._require(
            "buckets",
            len(sizes) > 0 and all(len(s) == 3 and min(s) >= 1 for s in sizes),
            "null or a list of [frames, height, width]",
            "use e.g. [[16,80,128],[12,128,80]]",
        )
        self._require("buckets", len({*sizes}) == len(sizes), "each size once", "remove the others")
        self._require(
            "fps", self.fps is None or 1 <= self.fps <= 240, "1 to 240, or null", "null keeps it"
        )
        self._require("holdout", 0 <= self.holdout < 1, "0 up to, not with, 1", "use e.g. 0.3")
        self._require("min_motion", 0 <= self.min_motion <= 255, "0 to 255", "use e.g. 0.3")
        self._require(
            "condition",
            self.condition in CONDITIONS,
            " or ".join(CONDITIONS),
            "name one of them",
        )
        self._require("augment", self.augment >= 0, ">= 0", "0 makes no copies")
        self._require(
            "max_clips",
            self.max_clips is None or self.max_clips >= 1,
            ">= 1, or null",
            "null keeps all",
        )

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes of clips: frames, height, width."""
        return buckets_of(vars(self))

    def place(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the buckets for a video: nearest in aspect, then area."""

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            aspect = abs(log(size[1] / size[0] * height / width))
            return round(aspect, 6), abs(log(size[0] * size[1] / (height * width)))

        return min(((h, w) for _, h, w in self.sizes), key=distance)

    def lengths(self, height: int, width: int) -> tuple[int, ...]:
        """Return the lengths of clips of a size, the longest first."""
        return tuple(sorted((f for f, *size in self.sizes if size == [height, width]))[::-1])

    def _require(self, name: str, holds: bool, allowed: str, fix: str) -> None:
        if not holds:
            raise Refusal(name, getattr(self, name), allowed, fix)


def buckets_of(settings: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """Return the sizes of clips in settings of an encode: frames, height, width."""
    if settings.get("buckets") is None:
        return ((settings["frames"], settings["height"], settings["width"]),)
    return tuple(tuple(size) for size in settings["buckets"])
