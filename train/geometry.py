"""Sizes of videos that a codec can take, and the cut of a video into patches."""

from typing import Protocol

from torch import Tensor

from gossamer.train.refusal import Refusal


class SizeRules(Protocol):
    """The part of a codec that decides which sizes it takes."""

    compression: tuple[int, int, int]

    def valid_frames(self, frames: int) -> bool: ...


def check_video(video: Tensor, codec: SizeRules) -> None:
    """Refuse what is not [B, 3, F, H, W] in sizes the codec takes."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise Refusal("video.shape", tuple(video.shape), "[B, 3, F, H, W]", "give RGB in [-1, 1]")
    frames, height, width = video.shape[2:]
    check_size(frames, height, width, codec)


def check_size(frames: int, height: int, width: int, codec: SizeRules) -> None:
    """Refuse frames, height or width that the codec cannot divide."""
    time, *space = codec.compression
    if not codec.valid_frames(frames):
        form = f"a multiple of {time}" if codec.valid_frames(time) else f"{time}k + 1"
        least = max(1, frames)
        nearest = next(n for n in range(least, least + time + 1) if codec.valid_frames(n))
        raise Refusal("frames", frames, form, f"use e.g. frames={nearest}")
    for name, value, size in zip(("height", "width"), (height, width), space, strict=True):
        if value < size or value % size:
            raise Refusal(
                name,
                value,
                f"a multiple of {size}",
                f"use e.g. {name}={max(size, value // size * size)}",
            )


def to_patches(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, 3, F, H, W] -> [B, f, h, w, 3*t*p*q]."""
    batch, colours, frames, height, width = video.shape
    t, p, q = patch
    cells = video.reshape(batch, colours, frames // t, t, height // p, p, width // q, q)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def from_patches(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, f, h, w, 3*t*p*q] -> [B, 3, F, H, W]."""
    batch, f, h, w, _ = patches.shape
    t, p, q = patch
    cells = patches.reshape(batch, f, h, w, 3, t, p, q).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cells.reshape(batch, 3, f * t, h * p, w * q)
