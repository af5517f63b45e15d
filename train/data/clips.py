"""Which clips to cut from a video, and the augmented copies of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gossamer.train.data.shots import Shot
from gossamer.train.data.video import Footage

FILM_SHOTS = 8  # from this many shots on, a video is split by its own shots
SMALLEST_CROP = 0.6


@dataclass(frozen=True)
class Clip:
    """Frames start to start + frames of one shot; copy 0 is the clip itself."""

    clip_id: str
    start: int
    frames: int
    shot: Shot
    split: str
    copy: int = 0


@dataclass(frozen=True)
class Skipped:
    """A shot that gives no clip, and why."""

    start: int
    end: int
    reason: str


def held_out(position: int, total: int, share: float) -> bool:
    """Whether an item belongs to the last share; at least one does where there are two."""
    count = round(total * share)
    if share > 0 and total > 1:
        count = min(max(count, 1), total - 1)
    return position >= total - count


def plan_clips(
    name: str,
    shots: Sequence[Shot],
    *,
    frames: int | Sequence[int],
    stride: int,
    min_motion: float,
    holdout: float,
    position: int,
    total: int,
) -> tuple[list[Clip], list[Skipped]]:
    """Cut the shots of video `position` of `total` into clips; none crosses a shot.

    Of several lengths of `frames` a shot takes the longest that fits it.

    A film (FILM_SHOTS shots or more, or the only video) holds out its last shots; of short videos
    the last ones are held out whole. A film whose usable shots would all be on one side holds out
    the last of those, or the end of its only one.
    """
    lengths = sorted([frames] if isinstance(frames, int) else frames, reverse=True)
    usable: list[tuple[Shot, str]] = []
    skipped = []
    is_film = total == 1 or len(shots) >= FILM_SHOTS
    for number, shot in enumerate(shots):
        if shot.end - shot.start < lengths[-1]:
            skipped.append(Skipped(shot.start, shot.end, f"shorter than {lengths[-1]} frames"))
            continue
        if shot.motion < min_motion:
            reason = f"static: motion {shot.motion:.2f} is below {min_motion}"
            skipped.append(Skipped(shot.start, shot.end, reason))
            continue
        place = (number, len(shots)) if is_film else (position, total)
        usable.append((shot, _split(*place, holdout)))
    if is_film and holdout > 0 and len({split for _, split in usable}) == 1:
        parts = [shot for shot, _ in usable]
        parts = parts if len(parts) > 1 else _cut(parts[0], lengths[-1], holdout)
        usable = [(shot, _split(i, len(parts), holdout)) for i, shot in enumerate(parts)]
    clips = [
        Clip(f"{name}@{start:06d}", start, longest, shot, split)
        for shot, split in usable
        for longest in [next(n for n in lengths if n <= shot.end - shot.start)]
        for start in range(shot.start, shot.end - longest + 1, stride)
    ]
    return clips, skipped


def _split(position: int, total: int, share: float) -> str:
    return "heldout" if held_out(position, total, share) else "train"


def _cut(shot: Shot, frames: int, holdout: float) -> list[Shot]:
    """Cut a shot into a part to train on and the end to hold out, if both hold a clip."""
    length = shot.end - shot.start
    if length < 2 * frames:
        return [shot]
    cut = shot.end - min(max(round(length * holdout), frames), length - frames)
    return [Shot(shot.start, cut, shot.motion), Shot(cut, shot.end, shot.motion)]


def evenly(items: Sequence, count: int | None) -> list:
    """At most `count` of the items, evenly spaced, in order."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def with_copies(clips: Sequence[Clip], copies: int) -> list[Clip]:
    """Each train clip followed by its augmented copies; held-out clips stay alone."""
    return [
        clip
        if copy == 0
        else Clip(f"{clip.clip_id}+{copy}", clip.start, clip.frames, clip.shot, clip.split, copy)
        for clip in clips
        for copy in range(1 + (copies if clip.split == "train" else 0))
    ]


def clip_pixels(footage: Footage, clip: Clip, seed: int) -> tuple[Tensor, str]:
    """A clip's frames, float [3, F, H, W] in [-1, 1], and what was done to them ("" for copy 0)."""
    window = slice(clip.start, clip.start + clip.frames)
    if clip.copy == 0:
        return to_float(footage.frames[window]), ""
    draw = np.random.default_rng(_seed(seed, clip.clip_id))
    zoom, across, down = draw.uniform(SMALLEST_CROP, 1.0), draw.random(), draw.random()
    flip, reverse = draw.random(2) < 0.5
    _, height, width, _ = footage.frames.shape
    _, wide_height, wide_width, _ = footage.wide.shape
    crop_height, crop_width = round(zoom * wide_height), round(zoom * wide_width)
    top = round(down * (wide_height - crop_height))
    left = round(across * (wide_width - crop_width))
    cut = footage.wide[window, top : top + crop_height, left : left + crop_width]
    # [F, 3, H, W]: bicubic keeps a zoomed crop sharp, antialias serves the shrunk one
    video = functional.interpolate(
        to_float(cut).transpose(0, 1), size=(height, width), mode="bicubic", antialias=True
    ).clamp(-1, 1)
    video = video.flip(3) if flip else video
    video = video.flip(0) if reverse else video
    done = ["crop", *(["flip"] if flip else []), *(["reverse"] if reverse else [])]
    return video.transpose(0, 1).contiguous(), "+".join(done)


def to_float(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> float [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def _seed(seed: int, clip_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{clip_id}".encode()).digest()[:8])
