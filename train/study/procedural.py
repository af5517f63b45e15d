"""A film that is no film: sprites over panning noise, for training data that do not match."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_SECOND = 24
SPRITES = 4

Frame = NDArray[np.uint8]  # [H, W, 3]


def write_film(
    path: Path,
    *,
    shots: int = 24,
    frames: int = 64,
    height: int = 144,
    width: int = 256,
    seed: int = 0,
) -> Path:
    """Write an H.264 film of so many shots of so many frames and return its path."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "14", "preset": "fast"}
        for shot in range(shots):
            for picture in draw_shot(frames, height, width, seed=(seed, shot)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def draw_shot(frames: int, height: int, width: int, *, seed: tuple[int, ...]) -> Iterator[Frame]:
    """Yield the frames of one shot: the same for the same seed."""
    chance = np.random.default_rng(seed)
    ground = _texture(chance, 2 * height, 2 * width)
    pan = chance.uniform(-2, 2, 2)
    sprites = []
    for _ in range(SPRITES):
        size = int(chance.integers(height // 8, height // 3))
        start, speed = chance.uniform(0, 1, 2) * (height, width), chance.uniform(-4, 4, 2)
        sprites.append((_texture(chance, size, size), start, speed))
    for index in range(frames):
        top, left = (int(x) for x in np.round(pan * index))
        picture = np.roll(ground, (top, left), (0, 1))[:height, :width].copy()
        for texture, start, speed in sprites:
            y, x = (int(v) for v in np.round(start + speed * index))
            rows = np.arange(y, y + len(texture)) % height
            columns = np.arange(x, x + len(texture)) % width
            picture[np.ix_(rows, columns)] = texture
        yield picture


def _texture(chance: np.random.Generator, height: int, width: int) -> Frame:
    """Return smooth coloured noise with stripes on it."""
    coarse = chance.uniform(0, 255, (-(-height // 16) + 1, -(-width // 16) + 1, 3))
    y, x = np.arange(height) / 16, np.arange(width) / 16
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    smooth = (1 - down) * (1 - right) * coarse[np.ix_(top, left)]
    smooth += (1 - down) * right * coarse[np.ix_(top, left + 1)]
    smooth += down * (1 - right) * coarse[np.ix_(top + 1, left)]
    smooth += down * right * coarse[np.ix_(top + 1, left + 1)]
    angle, pitch = chance.uniform(0, np.pi), chance.uniform(4, 16)
    place = np.add.outer(np.sin(angle) * np.arange(height), np.cos(angle) * np.arange(width))
    stripes = 30 * np.sin(2 * np.pi * place / pitch)[..., None]
    return (smooth + stripes).clip(0, 255).astype(np.uint8)
