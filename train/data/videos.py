"""Sources opened one after another: decoded, split into shots, planned into clips."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from gossamer.train.data.clips import SMALLEST_CROP, Clip, Skipped, clip_pixels, evenly, plan_clips
from gossamer.train.data.settings import EncodeSettings
from gossamer.train.data.shots import find_shots
from gossamer.train.data.sources import SourceItem
from gossamer.train.data.video import BadClip, Footage, read_video, video_size


@dataclass(frozen=True, eq=False)
class Video:
    """A source with its footage and clips, or with the reason why it is bad."""

    item: SourceItem
    footage: Footage | None = None
    shots: int = 0
    clips: list[Clip] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)  # height and width of its clips
    bad: str = ""

    def pixels(self, clip: Clip, seed: int) -> tuple[Tensor, str]:
        """One of its clips, float [3, F, H, W], and its augmentation."""
        assert self.footage is not None, "a bad video has no clips"
        return clip_pixels(self.footage, clip, seed)


class Videos:
    """Opens sources ahead in threads but yields them in order; an only film is decoded once."""

    def __init__(
        self, items: Sequence[SourceItem], settings: EncodeSettings, scratch: Path, num_workers: int
    ) -> None:
        self._items, self._settings, self._scratch = items, settings, scratch
        self._workers = max(1, num_workers)
        self._film: Video | None = None

    def __len__(self) -> int:
        return len(self._items)

    def opened(self, positions: Sequence[int]) -> Iterator[Video]:
        """The sources at these positions; at most num_workers + 1 are held decoded."""
        if len(self._items) == 1:
            self._film = self._film or self._open(0)
            yield self._film
            return
        with ThreadPoolExecutor(self._workers) as pool:
            ahead: list[Future[Video]] = []
            for position in tqdm(positions, desc="videos", unit="video", disable=None):
                ahead.append(pool.submit(self._open, position))
                if len(ahead) > self._workers:
                    yield ahead.pop(0).result()
            while ahead:
                yield ahead.pop(0).result()

    def _open(self, position: int) -> Video:
        item, settings = self._items[position], self._settings
        height, width = settings.height, settings.width
        try:
            if settings.buckets is not None:
                height, width = settings.place(*video_size(item.path))
            footage = read_video(
                item.path,
                height=height,
                width=width,
                scratch=self._scratch,
                fps=settings.fps,
                zoom=1 / SMALLEST_CROP if settings.augment else 1.0,
                progress=len(self._items) == 1,
            )
        except BadClip as error:
            return Video(item, bad=error.reason)
        shots = find_shots(footage.histogram_distance, footage.change)
        clips, skipped = plan_clips(
            item.name,
            shots,
            frames=settings.lengths(height, width),
            stride=settings.stride,
            min_motion=settings.min_motion,
            holdout=settings.holdout,
            position=position,
            total=len(self._items),
        )
        share = settings.max_clips and max(1, settings.max_clips // len(self._items))
        return Video(item, footage, len(shots), evenly(clips, share), skipped, (height, width))
