"""Small videos in any codec; as a script, PATH CODEC in a process of its own."""

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    count: int = 8,
    *,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (48, 32),
    times: Callable[[int], int] = lambda i: i,
    level: int = 60,
) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if codec == "libx265":  # asm=0: on frames this small its assembly corrupts the heap
            stream.options = {
                "x265-params": "log-level=none:pools=none:frame-threads=1:asm=0",
                "preset": "ultrafast",
            }
        for index in range(count):
            pixels = np.full((height, width, 3), level, np.uint8)
            left = index * 4 % (width - 8)
            pixels[4:16, left : left + 8] = (255, 128, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            frame.pts = times(index)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    write_video(sys.argv[1], codec=sys.argv[2])
