"""Pictures of sample videos: six frames a row for each model, and the same as a small GIF."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Frames = NDArray[np.uint8]  # [F, H, W, 3]

ROWS = {
    "real": "real video",
    "teacher": "dense teacher",
    "before": "sparse, before",
    "after": "sparse, after",
}
NUM_FRAMES, MAX_MOVING_FRAMES = 6, 24
TILE, MOVING_TILES = 168, (224, 168, 112)  # pixels wide
MOVING_BYTES = 1_500_000
MOVING_FRAMES_PER_SECOND = 8
GAP, LABEL, HEADER = 6, 118, 24  # pixels
PAPER, INK = (24, 27, 31), (230, 233, 236)


@dataclass(frozen=True, eq=False)
class Sample:
    """The videos of one held-out clip, in the order of ROWS, and its caption."""

    videos: dict[str, Frames]
    caption: str

    @classmethod
    def read(cls, path: Path) -> Sample:
        """Read an archive that evaluation wrote."""
        with np.load(path, allow_pickle=False) as archive:
            videos = {row: archive[row] for row in ROWS if row in archive}
            caption = str(archive["caption"]) if "caption" in archive else ""
        return cls(videos=videos, caption=caption)


def write_strip(sample: Sample, path: Path) -> Path:
    """Save a PNG with one labelled row a video and six frames evenly spread over the clip."""
    height = _tile_height(sample, TILE)
    canvas = _canvas(
        LABEL + NUM_FRAMES * (TILE + GAP), HEADER + len(sample.videos) * (height + GAP)
    )
    for row, (name, video) in enumerate(sample.videos.items()):
        top = HEADER + row * (height + GAP)
        _write(canvas, (GAP, top + height // 2), ROWS[name], anchor="lm")
        for column, frame in enumerate(_spread(len(video), NUM_FRAMES)):
            left = LABEL + column * (TILE + GAP)
            canvas.paste(_tile(video[frame], TILE, height), (left, top))
            if row == 0:
                _write(canvas, (left, HEADER // 2), f"frame {frame + 1}", anchor="lm")
    canvas.save(path, optimize=True)
    return path


def write_moving(sample: Sample, path: Path) -> Path | None:
    """Save the videos side by side as a looping GIF, or return None where it would be too large."""
    for width in MOVING_TILES:
        encoded = _gif([_side_by_side(sample, frame, width) for frame in _moving_frames(sample)])
        if len(encoded) <= MOVING_BYTES:
            path.write_bytes(encoded)
            return path
    return None


def _moving_frames(sample: Sample) -> list[int]:
    shortest = min(len(video) for video in sample.videos.values())
    return _spread(shortest, MAX_MOVING_FRAMES)


def _side_by_side(sample: Sample, frame: int, width: int) -> Image:
    height = _tile_height(sample, width)
    canvas = _canvas(len(sample.videos) * (width + GAP) + GAP, HEADER + height + GAP)
    for column, (name, video) in enumerate(sample.videos.items()):
        left = GAP + column * (width + GAP)
        _write(canvas, (left, HEADER // 2), ROWS[name], anchor="lm")
        canvas.paste(_tile(video[frame], width, height), (left, HEADER))
    return canvas


def _gif(pictures: list[Image]) -> bytes:
    from PIL.Image import Dither

    # One palette for all frames: a palette a frame flickers, and takes ten times as long.
    palette = _stacked([pictures[n].reduce(2) for n in _spread(len(pictures), 5)]).quantize(256)
    first, *rest = [p.quantize(palette=palette, dither=Dither.NONE) for p in pictures]
    encoded = io.BytesIO()
    duration = 1000 // MOVING_FRAMES_PER_SECOND
    first.save(encoded, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return encoded.getvalue()


def _stacked(pictures: list[Image]) -> Image:
    width, height = pictures[0].size
    stack = _canvas(width, height * len(pictures))
    for row, picture in enumerate(pictures):
        stack.paste(picture, (0, row * height))
    return stack


def _spread(length: int, count: int) -> list[int]:
    """Return count frame numbers from the first to the last, or all of a shorter video."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _tile_height(sample: Sample, width: int) -> int:
    _, height, source_width, _ = next(iter(sample.videos.values())).shape
    return round(height * width / source_width)


def _tile(frame: Frames, width: int, height: int) -> Image:
    from PIL import Image

    return Image.fromarray(frame[..., :3]).resize((width, height), Image.Resampling.BICUBIC)


def _canvas(width: int, height: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height), PAPER)


def _write(canvas: Image, place: tuple[int, int], text: str, anchor: str) -> None:
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    ImageDraw.Draw(canvas).text(place, text, fill=INK, font=font, anchor=anchor)
