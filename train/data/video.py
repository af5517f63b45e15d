"""Decode a video once: uint8 frames of the wanted size, and the signals for cut detection."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm

from gossamer.train.data.shots import ChangeMeter

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

# Of swscale, whose default of one for each core takes several times as long on small frames.
THREADS = 4
METER_SIZE = (128, 72)  # width, height: cuts and motion are measured alike whatever the target size


class BadClip(Exception):
    """A video that cannot be used; `reason` goes to bad_clips.jsonl."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))
        self.reason = str(self)


@dataclass(frozen=True, eq=False)
class Footage:
    """One decoded video, in memory-mapped files that vanish with it."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    wide: np.ndarray  # uint8 [F, H', W', 3], H' >= H: what crop-zoom copies are cut from
    fps: float
    histogram_distance: np.ndarray  # [F - 1], see shots.py
    change: np.ndarray  # [F - 1]


def read_video(
    path: Path,
    *,
    height: int,
    width: int,
    scratch: Path,
    fps: float | None = None,
    zoom: float = 1.0,
    progress: bool = False,
) -> Footage:
    """Decode, resize to cover height x width, crop the centre; rotation flags are ignored.

    `fps` drops or repeats whole frames; None keeps them. `zoom` > 1 also keeps frames up to that
    much larger, as far as the source has the detail. Raises BadClip.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            stream.thread_type = "AUTO"
            source_fps = stream.average_rate or stream.guessed_rate or Fraction(24)
            zoom = min(zoom, stream.width / width, stream.height / height)
            wide = (int(height * zoom), int(width * zoom)) if zoom > 1 else (height, width)
            decoded = tqdm(
                container.decode(stream),
                total=stream.frames or None,
                desc=f"decode {path.name}",
                unit="frame",
                disable=None if progress else True,
            )
            frames = _resampled(decoded, source_fps, fps)
            return _store(frames, (height, width), wide, float(fps or source_fps), scratch)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadClip(f"{type(error).__name__}: {error}") from error


def video_size(path: Path) -> tuple[int, int]:
    """Return the height and width of a video's frames; raises BadClip."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            return stream.height, stream.width
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadClip(f"{type(error).__name__}: {error}") from error


def _stream(container: "av.container.InputContainer") -> "av.VideoStream":
    if not container.streams.video:
        raise BadClip("no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadClip("a codec that is not known")
    if stream.height < 1 or stream.width < 1:
        raise BadClip(f"frames of {stream.height} x {stream.width}")
    return stream


def _resampled(
    frames: Iterator["av.VideoFrame"], source_fps: Fraction, fps: float | None
) -> Iterator["av.VideoFrame"]:
    ratio = Fraction(fps).limit_denominator(1001) / source_fps if fps else Fraction(1)
    for number, frame in enumerate(frames):
        for _ in range(int((number + 1) * ratio) - int(number * ratio)):
            yield frame


def _store(
    frames: Iterator["av.VideoFrame"],
    size: tuple[int, int],
    wide_size: tuple[int, int],
    fps: float,
    scratch: Path,
) -> Footage:
    from av.video.reformatter import VideoReformatter

    meter, count = ChangeMeter(), 0
    # each keeps its swscale context, which takes longer to make than a frame to scale
    to_small, to_size, to_wide = (VideoReformatter() for _ in range(3))
    with (
        tempfile.TemporaryFile(dir=scratch) as file,
        tempfile.TemporaryFile(dir=scratch) as wide_file,
    ):
        for frame in frames:
            meter.add(_scaled(to_small, frame, *METER_SIZE, "AREA"))
            file.write(_cover(to_size, frame, *size).tobytes())
            if wide_size != size:
                wide_file.write(_cover(to_wide, frame, *wide_size).tobytes())
            count += 1
        if count == 0:
            raise BadClip("no frame could be decoded")
        stored = _mapped(file, (count, *size, 3))
        wide = stored if wide_size == size else _mapped(wide_file, (count, *wide_size, 3))
    return Footage(stored, wide, fps, *meter.signals())


def _mapped(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    file.flush()
    return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)


def _cover(
    scaler: "VideoReformatter", frame: "av.VideoFrame", height: int, width: int
) -> np.ndarray:
    """Scale the frame, keeping its aspect, until it covers the size; then crop the centre."""
    scale = max(width / frame.width, height / frame.height)
    scaled_width = max(width, round(frame.width * scale))
    scaled_height = max(height, round(frame.height * scale))
    method = "AREA" if scale < 1 else "BICUBIC"
    scaled = _scaled(scaler, frame, scaled_width, scaled_height, method)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return scaled[top : top + height, left : left + width]


def _scaled(
    scaler: "VideoReformatter", frame: "av.VideoFrame", width: int, height: int, method: str
) -> np.ndarray:
    scaled = scaler.reformat(
        frame, width, height, format="rgb24", interpolation=method, threads=THREADS
    )
    return scaled.to_ndarray()
