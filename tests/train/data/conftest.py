"""Small procedural videos: a square runs over a striped ground; each shot has its own grey."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

MakeVideo = Callable[..., Path]
LEVELS = (40, 200, 100, 240, 10, 160)


def shot_frames(
    number: int, count: int, height: int, width: int, moving: bool = True
) -> np.ndarray:
    """uint8 [count, height, width, 3]."""
    stripes = (np.arange(width) // 4 % 2 * 12)[None, :, None]
    ground = np.clip(LEVELS[number % len(LEVELS)] + stripes, 0, 255)
    frames = np.broadcast_to(ground, (count, height, width, 3)).astype(np.uint8).copy()
    for index, frame in enumerate(frames):
        left = (index * 3 if moving else 0) % (width - 8)
        frame[height // 4 : height // 4 + 8, left : left + 8] = (255, 128, 0)
    return frames


@pytest.fixture
def make_video() -> MakeVideo:
    """Write shots of the given lengths (negative: a static shot) as an H.264 file."""

    def make(
        path: Path,
        shots: Sequence[int] = (8,),
        *,
        height: int = 32,
        width: int = 48,
        fps: int = 12,
        pix_fmt: str = "yuv420p",
        first_level: int = 0,
    ) -> Path:
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            stream.options = {"crf": "10", "preset": "ultrafast"}
            for number, length in enumerate(shots):
                for pixels in shot_frames(
                    number + first_level, abs(length), height, width, length > 0
                ):
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make
