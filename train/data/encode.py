"""Videos and captions -> latent shards: decode once, split into shots and clips, encode, write."""

import dataclasses
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor

from gossamer.train.codec import Codec, PCACodec, load_codec
from gossamer.train.condition import Condition
from gossamer.train.data.clips import evenly
from gossamer.train.data.quarantine import BAD_SHARE, refuse_many
from gossamer.train.data.rows import CODEC, RowWriter
from gossamer.train.data.settings import EncodeSettings
from gossamer.train.data.shards import Manifest
from gossamer.train.data.sources import SourceItem, list_sources
from gossamer.train.data.unfinished import BEGUN, left
from gossamer.train.data.videos import Videos
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import LOCK
from gossamer.train.text import TextEncoder

log = logging.getLogger(__name__)

FIT_CLIPS = 200
FIT_VIDEOS = 50
OURS = re.compile(
    r"(train|heldout)-\d{5}\.parquet|(bad_clips|skipped)\.jsonl|begun\.json|codec|\.cache|\.scratch.*"
    r"|\.(train|heldout|bad_clips|skipped|begun|manifest)[^/]*\.tmp"
)


def encode(
    source: str | Path,
    out_dir: str | Path,
    *,
    codec: Codec,
    text: TextEncoder,
    height: int,
    width: int,
    frames: int,
    buckets: Sequence[Sequence[int]] | None = None,
    stride: int = 8,
    fps: float | None = None,
    holdout: float = 0.3,
    min_motion: float = 0.3,
    condition: Condition = "first_frame",
    augment: int = 0,
    max_clips: int | None = None,
    rows_per_shard: int = 256,
    seed: int = 0,
    num_workers: int = 2,
    batch_size: int = 16,
) -> Manifest:
    """Encode a source into `out_dir`; returns at once where the same request is already there.

    One that ended early goes on after its last whole shard, and writes what it would have.
    With `buckets` a video is cut to the nearest of their aspects, a shot to the longest that fits.
    Raises Refusal: a wrong setting, another request's data in `out_dir`, more than 5 % of it
    damaged or of the videos unusable, no clip left. An unfitted PCACodec is fitted on train clips.
    """
    settings = EncodeSettings(
        height=height,
        width=width,
        frames=frames,
        buckets=None if buckets is None else tuple(tuple(b) for b in buckets),  # type: ignore[misc]
        stride=stride,
        fps=fps,
        holdout=holdout,
        min_motion=min_motion,
        condition=condition,
        augment=augment,
        max_clips=max_clips,
        rows_per_shard=rows_per_shard,
        seed=seed,
    )
    for size in settings.sizes:
        codec.latent_shape(*size)
    items = evenly(list_sources(source), max_clips)
    request = _request(items, settings, codec, text)
    out = Path(out_dir)
    existing = Manifest.load(out)
    if existing is not None:
        return _reuse(existing, out, request)
    shards = left(out, request)
    _prepare(out, {BEGUN, CODEC, *(shard.file for shard in shards)} if shards else set())
    if shards:
        log.info("going on after %d shards of an encode that ended early", len(shards))
    with tempfile.TemporaryDirectory(prefix=".scratch", dir=out) as scratch:
        videos = Videos(items, settings, Path(scratch), num_workers)
        if isinstance(codec, PCACodec) and not codec.is_fitted:
            fitted = load_codec(out / CODEC) if shards else _fit(codec, videos, seed)
            codec = fitted.to(codec.device)
        writer = RowWriter(out, settings, codec, text, batch_size, num_workers, request, shards)
        for video in videos.opened(range(len(items))):
            writer.add(video)
        manifest = writer.finish()
    log.info("encoded %s into %s", manifest.splits, out)
    return manifest


def _request(
    items: list[SourceItem], settings: EncodeSettings, codec: Codec, text: TextEncoder
) -> dict:
    if isinstance(codec, PCACodec) and not codec.is_fitted:
        asked = f"fit pca {codec.compression} {codec.channels} {codec.power}"
    else:
        asked = codec.fingerprint
    sources = [{"name": i.name, "sha256": i.content_hash(), "caption": i.caption} for i in items]
    values = {
        "sources": sources,
        "codec": asked,
        "text": text.fingerprint,
        **dataclasses.asdict(settings),
    }
    return json.loads(json.dumps(values))


def _reuse(existing: Manifest, out: Path, request: dict) -> Manifest:
    for key, value in request.items():
        if existing.request.get(key) != value:
            held, asked = (json.dumps(v)[:80] for v in (existing.request.get(key), value))
            raise Refusal(
                "out_dir",
                out,
                f"an empty folder or the same request ({key} there: {held}, asked: {asked})",
                "choose another out_dir or delete this one",
            )
    damaged = existing.damaged(out)
    if damaged:
        clips, total = sum(shard.rows for shard, _ in damaged), sum(existing.splits.values())
        lines = [f"{shard.file}: {how}" for shard, how in damaged]
        if clips > BAD_SHARE * total:
            raise refuse_many(lines, f"{clips} of {total} clips in {out}")
        log.warning("%d of %d clips are damaged and left out: %s", clips, total, "; ".join(lines))
    log.info("%s is already encoded and verified: nothing to do", out)
    return existing


def _prepare(out: Path, kept: set[str]) -> None:
    """Make the folder, and clear what an unfinished encode left but for what is kept of it."""
    out.mkdir(parents=True, exist_ok=True)
    entries = list(out.iterdir())
    entries = [entry for entry in entries if entry.name not in {LOCK, *kept}]
    foreign = [entry.name for entry in entries if not OURS.fullmatch(entry.name)]
    if foreign:
        raise Refusal("out_dir", out, "an empty folder", f"choose another: it holds {foreign[0]}")
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _fit(codec: PCACodec, videos: Videos, seed: int) -> PCACodec:
    """Fit the specification on at most FIT_CLIPS train clips, evenly spaced."""
    positions = evenly(range(len(videos)), FIT_VIDEOS)

    def clips() -> Iterator[Tensor]:
        for video in videos.opened(positions):
            train = [clip for clip in video.clips if clip.split == "train"]
            for clip in evenly(train, max(1, FIT_CLIPS // len(positions))):
                yield video.pixels(clip, seed)[0].to(codec.device)

    chosen = clips()
    first = next(chosen, None)
    if first is None:
        return codec  # nothing will be encoded either; finish() says why
    log.info("fitting the codec on train clips")
    return PCACodec.fit(
        chain([first], chosen), patch=codec.compression, channels=codec.channels, power=codec.power
    )
