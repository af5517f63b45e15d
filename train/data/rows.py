"""Clips -> codec -> rows -> shards, and the record of what was left out."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from gossamer.train.codec import Codec
from gossamer.train.condition import held_frames
from gossamer.train.data.clips import Clip, with_copies
from gossamer.train.data.quarantine import BAD_SHARE
from gossamer.train.data.settings import EncodeSettings
from gossamer.train.data.shards import Manifest, Row, Shard, ShardWriter, to_bytes
from gossamer.train.data.unfinished import BEGUN, note
from gossamer.train.data.videos import Video
from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal
from gossamer.train.text import TextEncoder

CODEC = "codec"  # the folder beside the shards
T = TypeVar("T")


class RowWriter:
    """Takes one video after another; `finish` writes the manifest, or refuses."""

    def __init__(
        self,
        out: Path,
        settings: EncodeSettings,
        codec: Codec,
        text: TextEncoder,
        batch_size: int,
        num_workers: int,
        request: dict,
        shards: list[Shard],
    ) -> None:
        self._out, self._settings, self._codec, self._text = out, settings, codec, text
        self._batch_size, self._num_workers = batch_size, max(1, num_workers)
        prints = {"codec": codec.fingerprint, "text": text.fingerprint}
        self._request = request
        self._shards = ShardWriter(out, settings.rows_per_shard, prints, list(shards))
        self._noted = len(shards)
        self._written: Counter[tuple[str, tuple[int, ...]]] = Counter()  # rows still to pass over
        for shard in shards:
            self._written[shard.split, tuple(shard.latent_shape)] += shard.rows
        self._seen = 0
        self._bad: list[dict] = []
        self._sources: list[dict] = []
        self._skipped: list[dict] = []
        self._splits: Counter[str] = Counter()

    def add(self, video: Video) -> None:
        """Encode one video's clips with their copies."""
        name = video.item.name
        self._seen += 1
        if video.footage is None:
            self._bad.append({"video": name, "reason": video.bad})
            return
        self._sources.append(
            {"name": name, "frames": len(video.footage.frames), "shots": video.shots}
        )
        self._skipped += [{"video": name, **dataclasses.asdict(shot)} for shot in video.skipped]
        clips = with_copies(video.clips, self._settings.augment)
        batches = [(b, [self._is_written(clip, video) for clip in b]) for b in self._batches(clips)]
        batches = [(batch, written) for batch, written in batches if not all(written)]
        if not batches:
            return
        text = self._text.encode([video.item.caption])[0]  # [L, dim]
        text = text[: int(text.any(1).nonzero().max()) + 1] if text.any() else text[:0]
        done = len(clips) - sum(len(batch) for batch, _ in batches)
        bar = tqdm(total=len(clips), initial=done, desc=name, unit="clip", disable=None)
        with bar, ThreadPoolExecutor(self._num_workers) as pool:
            cut = partial(_cut, video, seed=self._settings.seed)
            started = (
                (batch, written, [pool.submit(cut, clip) for clip in batch])
                for batch, written in batches
            )
            for batch, written, cuts in _one_ahead(started):
                rows = self._rows(video, batch, [each.result() for each in cuts], text)
                for row, is_written in zip(rows, written, strict=True):
                    if not is_written:
                        self._shards.add(row)
                        self._note()
                bar.update(len(batch))

    def _is_written(self, clip: Clip, video: Video) -> bool:
        """Count the clip, the next of its kind, and say whether a shard has it already."""
        self._splits[clip.split] += 1
        kind = clip.split, self._codec.latent_shape(clip.frames, *video.size)
        self._written[kind] -= 1
        return self._written[kind] >= 0

    def _note(self) -> None:
        """Leave what is whole to an encode that goes on after this one."""
        shards = self._shards.shards
        if len(shards) == self._noted:
            return
        if not self._noted:
            self._codec.save(self._out / CODEC)
        note(self._out, self._request, shards)
        self._noted = len(shards)

    def finish(self) -> Manifest:
        """Write what is left and the manifest; refuse on too many bad videos or no clip."""
        _write_lines(self._out / "bad_clips.jsonl", self._bad)
        _write_lines(self._out / "skipped.jsonl", self._skipped)
        if len(self._bad) > BAD_SHARE * self._seen:
            first = "; ".join(f"{bad['video']}: {bad['reason']}" for bad in self._bad[:5])
            raise Refusal(
                "source",
                f"{len(self._bad)} of {self._seen} videos unusable",
                f"at most {BAD_SHARE:.0%}",
                f"mend or remove those listed in {self._out / 'bad_clips.jsonl'}, first: {first}",
            )
        shards = self._shards.close()
        if not shards:
            reasons = Counter(shot["reason"].split(":")[0] for shot in self._skipped)
            raise Refusal(
                "source",
                f"0 clips ({dict(reasons)} shots skipped)",
                "at least one clip",
                "lower frames or min_motion, or give longer videos",
            )
        if not self._noted:  # else beside the first shard
            self._codec.save(self._out / CODEC)
        manifest = Manifest(
            request=self._request,
            codec={
                "fingerprint": self._codec.fingerprint,
                "channels": self._codec.channels,
                "compression": list(self._codec.compression),
            },
            text={
                "fingerprint": self._text.fingerprint,
                "length": self._text.length,
                "dim": self._text.dim,
            },
            sources=self._sources,
            shards=shards,
            splits=dict(sorted(self._splits.items())),
            skipped_shots=len(self._skipped),
            bad_clips=len(self._bad),
        )
        manifest.save(self._out)
        (self._out / BEGUN).unlink(missing_ok=True)
        return manifest

    def _batches(self, clips: list[Clip]) -> Iterator[list[Clip]]:
        for _, same in groupby(clips, lambda clip: clip.frames):
            alike = list(same)
            for start in range(0, len(alike), self._batch_size):
                yield alike[start : start + self._batch_size]

    def _rows(
        self, video: Video, clips: list[Clip], cuts: list["_Cut"], text: Tensor
    ) -> Iterator[Row]:
        # [B, 3, F, H, W]
        pixels = torch.stack([cut.pixels for cut in cuts]).to(self._codec.device)
        latents = self._codec.encode(pixels)
        conditions: Tensor | None = None
        if self._settings.condition != "none":
            first, last = pixels[:, :, 0], pixels[:, :, -1]
            held = held_frames(self._settings.condition, first, last, pixels.shape[2])
            conditions = self._codec.encode(held)
        for index, (clip, cut) in enumerate(zip(clips, cuts, strict=True)):
            latent = latents[index]
            if not latent.isfinite().all():
                raise Refusal(
                    f"latent of {clip.clip_id}",
                    "NaN or Inf",
                    "finite numbers",
                    "check the codec's weights",
                )
            condition = latent.new_zeros(0) if conditions is None else conditions[index]
            yield Row(
                clip_id=clip.clip_id,
                source=video.item.name,
                start=clip.start,
                frames=clip.frames,
                fps=video.footage.fps if video.footage else 0.0,
                height=cut.pixels.shape[2],
                width=cut.pixels.shape[3],
                shot_start=clip.shot.start,
                shot_end=clip.shot.end,
                split=clip.split,
                augment=cut.augment,
                latent=to_bytes(latent),
                latent_shape=list(latent.shape),
                condition=to_bytes(condition),
                condition_shape=[] if conditions is None else list(condition.shape),
                text=to_bytes(text),
                text_shape=list(text.shape),
                prompt=video.item.caption,
                content_sha256=cut.sha256,
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Cut:
    """A clip as float [3, F, H, W] in [-1, 1], what was done to it, its hash as uint8."""

    pixels: Tensor
    augment: str
    sha256: str


def _cut(video: Video, clip: Clip, *, seed: int) -> _Cut:
    pixels, augment = video.pixels(clip, seed)
    frames = pixels.add(1).mul_(127.5).round_().to(torch.uint8).contiguous().numpy()
    return _Cut(pixels, augment, hashlib.sha256(frames.tobytes()).hexdigest())


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each after the next one was asked for."""
    previous: list[T] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _write_lines(path: Path, entries: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
