"""The settings of an encode, checked before any work."""

from dataclasses import dataclass

from gossamer.train.condition import CONDITIONS, Condition
from gossamer.train.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Everything that decides the rows, apart from the source, the codec and the text encoder."""

    height: int
    width: int
    frames: int
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

    def _require(self, name: str, holds: bool, allowed: str, fix: str) -> None:
        if not holds:
            raise Refusal(name, getattr(self, name), allowed, fix)
