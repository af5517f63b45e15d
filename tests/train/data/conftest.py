"""Small procedural videos: a square runs over a striped ground; each shot has its own grey."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.train.data.shards import Manifest, Row, ShardWriter, to_bytes

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


@pytest.fixture
def make_data() -> Callable[..., Path]:
    """Write shards of `rows` clips each, of the shapes in turn; clip i is filled with i."""

    def make(
        folder: Path,
        shards: int = 4,
        rows: int = 4,
        shapes: Sequence[tuple[int, ...]] = ((2, 2, 4, 4),),
    ) -> Path:
        folder.mkdir(parents=True)
        writer = ShardWriter(folder, rows, {})
        for number in range(shards * rows):
            shape = shapes[number // rows % len(shapes)]
            latent = torch.full(shape, float(number))
            writer.add(
                Row(
                    clip_id=f"clip-{number}", source="film", start=number, frames=4, fps=12.0,
                    height=16, width=16, shot_start=0, shot_end=9, split="train", augment="",
                    latent=to_bytes(latent), latent_shape=list(shape), condition=b"",
                    condition_shape=[], text=to_bytes(torch.ones(1, 4)), text_shape=[1, 4],
                    prompt="", content_sha256="",
                )
            )  # fmt: skip
        Manifest(
            request={"frames": 4, "height": 16, "width": 16},
            codec={"fingerprint": "none", "channels": shapes[0][0], "compression": [2, 4, 4]},
            text={"fingerprint": "none", "length": 2, "dim": 4},
            sources=[],
            shards=writer.close(),
            splits={"train": shards * rows},
        ).save(folder)
        (folder / "codec").mkdir()
        (folder / "codec" / "config.json").write_text("{}")
        return folder

    return make
