"""Data faults, D1 to D10 of the catalogue (shared/spec/reliability.md, 4.6).

Elsewhere, and not repeated here: tests/train/data/test_video.py (D1: truncated, empty, text, sound
only, gone, 4:4:4 and 10-bit), test_encode.py (D1: listed and at most 5 %; D2: short shots skipped
with their reason; D4: no clip left), test_dataset.py (D7: a killed worker; D10: workers and order),
test_schedule.py (D10 of streamed buckets), test_store.py (outages), test_waiting.py (D8).
"""

import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import get_worker_info
from videos import write_video

from gossamer.train.codec import PCACodec
from gossamer.train.data import dataset as dataset_module
from gossamer.train.data import shards as shards_module
from gossamer.train.data.dataset import LatentDataset, batches
from gossamer.train.data.encode import encode
from gossamer.train.data.shards import Manifest, Row, ShardWriter, from_bytes, to_bytes
from gossamer.train.data.store import Store, mirror
from gossamer.train.data.video import BadClip, read_video
from gossamer.train.files import sha256
from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords

SHARDS = 20  # one of them is the 5 % that may be bad
SHAPE = (2, 2, 4, 4)


def write_data(folder: Path, shards: int = SHARDS, rows: int = 1) -> Path:
    """Write shards of `rows` clips; the latent of clip i is filled with i + 1."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, rows, {})
    for number in range(shards * rows):
        values = dict.fromkeys(("source", "augment", "prompt", "content_sha256"), "")
        numbers = dict.fromkeys(("frames", "height", "width", "shot_start", "shot_end"), 8)
        writer.add(
            Row(
                **values, **numbers, clip_id=f"clip-{number}", start=number, fps=12.0,
                split="train", latent=to_bytes(torch.full(SHAPE, number + 1.0)),
                latent_shape=list(SHAPE), condition=b"", condition_shape=[],
                text=to_bytes(torch.ones(1, 4)), text_shape=[1, 4],
            )
        )  # fmt: skip
    Manifest(
        request={}, codec={"channels": 2}, text={"length": 2, "dim": 4}, sources=[],
        shards=writer.close(), splits={"train": shards * rows},
    ).save(folder)  # fmt: skip
    return folder


def manifest_of(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    assert manifest is not None
    return manifest


def relist(folder: Path, name: str) -> None:
    """Give a shard's present bytes to the manifest: what a faulty writer would have listed."""
    path = folder / name
    manifest = manifest_of(folder)
    shards = [
        replace(s, sha256=sha256(path), bytes=path.stat().st_size) if s.file == name else s
        for s in manifest.shards
    ]
    replace(manifest, shards=shards).save(folder)


def rewrite(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / name
    table = change(pq.read_table(path))
    pq.write_table(table, path, write_page_checksum=True)
    relist(folder, name)


# D1: videos that are not what they seem


def write_elsewhere(path: Path, codec: str) -> None:
    """Write a video in a process of its own: x265 aborts one that has run many other tests."""
    subprocess.run([sys.executable, inspect.getfile(write_video), path, codec], check=True)


def lie_in_the_header(path: Path) -> None:
    """Let an AVI claim 9999 frames of 4096 x 4096 in its main header."""
    content = bytearray(path.read_bytes())
    place = content.index(b"avih") + 8
    content[place + 16 : place + 20] = (9999).to_bytes(4, "little")
    content[place + 32 : place + 40] = (4096).to_bytes(4, "little") * 2
    path.write_bytes(content)


HANDLED: dict[str, Callable[[Path], Any]] = {
    "hevc.mp4": lambda p: write_elsewhere(p, codec="libx265"),
    "variable-rate.mkv": lambda p: write_video(p, times=lambda i: i * i),
    "odd-size.mkv": lambda p: write_video(p, codec="ffv1", pix_fmt="bgr0", size=(51, 37)),
    "alpha.mov": lambda p: write_video(p, codec="qtrle", pix_fmt="argb"),
    "10-bit.mkv": lambda p: write_video(p, codec="ffv1", pix_fmt="yuv420p10le"),
    "lying.avi": lambda p: lie_in_the_header(write_video(p)),
}
BAD: dict[str, Callable[[Path], Any]] = {
    "truncated.mp4": lambda p: p.write_bytes(write_video(p).read_bytes()[:700]),
    "empty.mp4": lambda p: p.write_bytes(b""),
    "text.mp4": lambda p: p.write_bytes(b"not a video" * 50),
    "huge-claim.avi": lambda p: p.write_bytes(b"RIFF\xff\xff\xff\xffAVI LIST" + b"\xff" * 64),
}


def encode_folder(source: Path, out: Path, **settings: Any) -> Manifest:
    return encode(
        source, out, codec=PCACodec(channels=12), text=HashedWords(dim=8, length=6),
        **{"height": 32, "width": 48, "frames": 8, "holdout": 0.0, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 videos: 4 bad, 6 unusual, one of a single frame, one short, 88 plain."""
    folder = tmp_path_factory.mktemp("hundred")
    for name, make in {**HANDLED, **BAD}.items():
        make(folder / name)
    write_video(folder / "one-frame.mkv", 1, codec="ffv1", pix_fmt="bgr0")
    write_video(folder / "short.mp4", 5)
    plain = [write_video(folder / f"plain-{level}.mp4", level=level) for level in range(8)]
    for number in range(80):
        shutil.copy(plain[number % 8], folder / f"copy-{number:02d}.mp4")
    assert len(list(folder.iterdir())) == 100
    return folder


def test_d1_d2_planted_videos_are_handled_or_skipped_and_listed(
    hundred: Path, tmp_path: Path
) -> None:
    manifest = encode_folder(hundred, tmp_path / "data")
    bad = [json.loads(line) for line in (tmp_path / "data/bad_clips.jsonl").open()]
    assert {entry["video"] for entry in bad} == set(BAD) and all(e["reason"] for e in bad)
    skipped = [json.loads(line) for line in (tmp_path / "data/skipped.jsonl").open()]
    reasons = {(entry["video"], entry["reason"]) for entry in skipped}
    assert {("one-frame.mkv", "shorter than 8 frames"), ("short.mp4", "shorter than 8 frames")} == {
        r for r in reasons if "static" not in r[1]
    }
    data = LatentDataset(tmp_path / "data", "train")
    used = {data.meta(i)["source"] for i in range(len(data))}
    assert used == {p.name for p in hundred.iterdir()} - set(BAD) - {"one-frame.mkv", "short.mp4"}
    assert all(data[i]["latent"].isfinite().all() for i in range(len(data)))
    assert manifest.bad_clips == len(BAD)


def test_d1_more_than_five_percent_bad_stops_with_the_list(hundred: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for path in sorted(hundred.iterdir())[:30]:
        (source / path.name).symlink_to(path)
    for name in BAD:
        (source / f"x-{name}").symlink_to(hundred / name)
    with pytest.raises(Refusal, match=r"videos unusable.*x-empty\.mp4"):
        encode_folder(source, tmp_path / "data")


def test_d1_a_rotated_video_is_decoded_as_it_is_stored(tmp_path: Path) -> None:
    """A display matrix of 90 degrees, written into the track's header, changes no pixel."""
    plain = write_video(tmp_path / "plain.mp4")
    content = bytearray(plain.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    turned = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]
    content[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in turned)
    (tmp_path / "turned.mp4").write_bytes(content)
    frames = [
        read_video(tmp_path / f"{name}.mp4", height=32, width=48, scratch=tmp_path).frames
        for name in ("plain", "turned")
    ]
    assert content != plain.read_bytes() and np.array_equal(*frames)


# D3: shards


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncated(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def swapped(path: Path, draw: random.Random) -> None:
    """Another whole shard under this name."""
    others = [p for p in path.parent.glob("*.parquet") if p != path]
    path.write_bytes(draw.choice(sorted(others)).read_bytes())


def set_column(name: str, column: Callable[[pa.Table], pa.Array]) -> Callable[..., None]:
    def mutate(path: Path, draw: random.Random) -> None:
        def change(table: pa.Table) -> pa.Table:
            return table.set_column(table.schema.get_field_index(name), name, column(table))

        rewrite(path.parent, path.name, change)

    return mutate


def planted(value: float) -> Callable[..., None]:
    def column(table: pa.Table) -> pa.Array:
        latents = []
        for row in table.to_pylist():
            latent = from_bytes(row["latent"], row["latent_shape"])
            latent.view(-1)[7] = value
            latents.append(to_bytes(latent))
        return pa.array(latents, pa.binary())

    return set_column("latent", column)


def without_latent(path: Path, draw: random.Random) -> None:
    rewrite(path.parent, path.name, lambda table: table.drop_columns(["latent"]))


def doubled(path: Path, draw: random.Random) -> None:
    rewrite(path.parent, path.name, lambda table: pa.concat_tables([table, table]))


INTEGERS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float64())
MUTATIONS: list[Callable[..., None]] = [
    flipped,
    flipped,
    flipped,
    truncated,
    lambda path, draw: path.write_bytes(b""),
    lambda path, draw: path.unlink(),
    swapped,
    planted(float("nan")),
    planted(float("inf")),
    without_latent,
    doubled,
    set_column("latent", lambda t: pa.array(["text"] * len(t), pa.string())),
    set_column("latent", lambda t: pa.array([b"\0" * 6] * len(t), pa.binary())),
    set_column("latent_shape", lambda t: pa.array([[2, 2, 4, 5]] * len(t), INTEGERS)),
    set_column("latent_shape", lambda t: pa.array([[2.0, 2, 4, 4]] * len(t), NUMBERS)),
    set_column("text_shape", lambda t: pa.array([[9, 4]] * len(t), INTEGERS)),
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.full)])
def test_d3_no_mutation_of_a_shard_is_silent(
    count: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read whole or row by row, the shard is named and listed, and its clip never comes back."""
    draw, silent = random.Random(0), []
    for number in range(count):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(data, copy)
        victim = draw.randrange(SHARDS)
        name = manifest_of(copy).shards[victim].file
        MUTATIONS[number % len(MUTATIONS)](copy / name, draw)
        monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", number // 2 % 2 * 2**30)
        listed = tmp_path / f"quarantine-{number}.jsonl"
        found = LatentDataset(copy, "train", quarantine=listed)
        values = {int(found[i]["latent"][0, 0, 0, 0]) for i in range(SHARDS)}
        names = [json.loads(line)["shard"] for line in listed.open()] if listed.exists() else []
        others = set(range(1, SHARDS + 1)) - {victim + 1}
        if names != [name] or values != others or found[victim]["index"] == victim:
            silent.append((number, name, names))
        shutil.rmtree(copy)
    assert silent == []


def test_d3_control_without_the_checks_a_mutation_is_silent(data: Path) -> None:
    """The same flips, read as parquet does by default, without SHA-256 and page checksums."""
    draw, silent = random.Random(0), 0
    path = sorted(data.glob("*.parquet"))[3]
    content, before = path.read_bytes(), pq.read_table(path)
    for _ in range(60):
        path.write_bytes(content)
        flipped(path, draw)
        try:
            silent += not pq.read_table(path).equals(before)
        except Exception:  # many flips are noticed, as they should be
            continue
    assert silent > 0


def test_d3_many_bad_shards_stop_with_the_list(data: Path, tmp_path: Path) -> None:
    names = [shard.file for shard in manifest_of(data).shards[4:6]]
    for name in names:
        (data / name).write_bytes(b"x")
    listed = tmp_path / "quarantine.jsonl"
    with pytest.raises(Refusal, match=rf"2 of 20 train clips in .*{names[0]}.*{names[1]}.*5%"):
        LatentDataset(data, "train", quarantine=listed)
    assert [json.loads(line)["shard"] for line in listed.open()] == names
    with pytest.raises(Refusal, match="2 of 20"):  # and so it stays
        LatentDataset(data, "train", quarantine=listed)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1), (4, 0)])
def test_d3_all_ranks_and_resumes_replace_the_same_clips(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    """No rank knows beforehand which shard is bad, and each opens only what it needs."""
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    name = manifest_of(data).shards[6].file
    (data / name).write_bytes(b"damaged")
    whole = LatentDataset(data, "train", quarantine=tmp_path / "one.jsonl")
    schedule = whole.schedule(4, seed=0)
    expected = [b["index"].tolist() for b in batches(whole, schedule, num_steps=10)]
    for start in (0, 7):
        parts = []
        for rank in range(world):
            mine = LatentDataset(data, "train", quarantine=tmp_path / f"{rank}.jsonl")
            options = {"start_step": start, "num_steps": 10 - start, "rank": rank, "world": world}
            loaded = batches(mine, schedule, num_workers=workers, **options)
            parts.append([batch["index"].tolist() for batch in loaded])
        assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == expected[start:]
    planned = [index for step in range(10) for index in schedule.indices(step)]
    changed = list(zip(planned, chain(*expected), strict=True))
    assert {p for p, e in changed if p != e} == {6} and 6 not in {e for _, e in changed}


def test_d3_what_a_run_listed_stays_out_although_it_was_mended(data: Path, tmp_path: Path) -> None:
    name, listed = manifest_of(data).shards[6].file, tmp_path / "quarantine.jsonl"
    content = (data / name).read_bytes()
    (data / name).write_bytes(b"damaged")
    first = LatentDataset(data, "train", quarantine=listed)[6]["index"]
    (data / name).write_bytes(content)
    assert LatentDataset(data, "train", quarantine=listed)[6]["index"] == first != 6
    assert LatentDataset(data, "train")[6]["index"] == 6


def test_d3_a_refusal_in_a_worker_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    for shard in manifest_of(data).shards[:5]:
        (data / shard.file).unlink()
    loaded = LatentDataset(data, "train")
    with pytest.raises(Refusal, match=r"train clips in .*damaged.*missing") as refusal:
        list(batches(loaded, loaded.schedule(4, 0), num_workers=2, num_steps=5))
    assert "\n" not in str(refusal.value) and "Traceback" not in str(refusal.value)


# D4, D5, D6, D7, D9


def test_d4_data_without_clips_is_refused(data: Path) -> None:
    replace(manifest_of(data), shards=[], splits={}).save(data)
    with pytest.raises(Refusal, match=r"split=train"):
        LatentDataset(data, "train")


OUTSIDE = [
    "../evil.parquet",
    "../../evil.parquet",
    "folder/../../evil.parquet",
    "folder/evil.parquet",
    "..\\evil.parquet",
    "~/evil.parquet",
    "file:///tmp/evil.parquet",
    ".hidden.parquet",
    "evil.parquet\n",
    "evil.parquet/../../evil.parquet",
    "evil\0.parquet",
    "evil.txt",
    "",
]


@pytest.fixture
def hostile(data: Path, tmp_path: Path) -> Callable[[str], str]:
    """Put the data at a URL whose manifest gives its first shard another name."""

    def place(name: str) -> str:
        manifest, bucket = manifest_of(data), tmp_path / "deep" / "bucket"
        shard = manifest.shards[0]
        renamed = replace(shard, file=name)
        replace(manifest, shards=[renamed, *manifest.shards[1:]]).save(data)
        shutil.copytree(data, bucket)
        for folder in (bucket, bucket.parent):
            shutil.copy(data / shard.file, folder / "evil.parquet")
        return f"file://{bucket}"

    return place


@pytest.mark.parametrize("name", [*OUTSIDE, "{tmp}/evil.parquet"])
def test_d5_a_shard_named_outside_its_folder_is_refused(
    name: str, hostile: Callable[[str], str], tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    url = hostile(name.format(tmp=tmp_path))
    mirror(url, cache)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(Refusal, match="no name of a shard"):
        LatentDataset(cache, "train", url=url)
    assert set(tmp_path.rglob("*")) == before


def test_d5_control_without_the_check_a_file_appears_outside(
    hostile: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_NAME", re.compile(r".*"))
    cache = tmp_path / "a" / "cache"
    url = hostile("../evil.parquet")
    mirror(url, cache)
    Store(cache, url).get(manifest_of(cache).shards[0])
    assert (tmp_path / "a" / "evil.parquet").is_file()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_d5_a_shard_that_is_no_plain_file_is_left_out_at_once(
    kind: str, data: Path, tmp_path: Path
) -> None:
    """None of them blocks or is read: 10 GB of nothing differ in size, before any hash."""
    path = data / manifest_of(data).shards[2].file
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(10 * 2**30)
    start = time.monotonic()
    found = LatentDataset(data, "train", quarantine=tmp_path / "quarantine.jsonl")
    assert found[2]["index"] != 2 and time.monotonic() - start < 5
    reason = json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"]
    assert reason.startswith("10737418240 bytes" if kind == "sparse" else "missing")


def test_d6_a_file_that_goes_during_the_run_is_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    found = LatentDataset(data, "train", quarantine=tmp_path / "quarantine.jsonl")
    loaded = batches(found, found.schedule(2, seed=0), num_steps=20)
    used = next(loaded)["index"].tolist()
    gone = next(i for i in range(SHARDS) if i not in used)
    (data / manifest_of(data).shards[gone].file).unlink()
    later = [index for batch in loaded for index in batch["index"].tolist()]
    assert len(later) == 38 and gone not in later
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"] == "missing"


def test_d6_a_video_that_goes_before_its_turn_is_listed(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match="FileNotFound"):
        read_video(tmp_path / "gone.mp4", height=32, width=48, scratch=tmp_path)


class _Dying(LatentDataset):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None and index == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_d7_a_worker_killed_in_the_midst_ends_the_loop_at_once(data: Path) -> None:
    """In a process of its own: torch tells of the death by an error wherever it is."""
    found = _Dying(data, "train")
    schedule = found.schedule(2, seed=0)
    found.last = schedule.indices(5)[0]
    start, pid = time.monotonic(), os.fork()
    if pid == 0:
        try:
            list(batches(found, schedule, num_workers=1))
        except (RuntimeError, OSError):
            os._exit(7)
        os._exit(0)
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() - start < 60:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 7 and ended[0] == pid


@pytest.mark.parametrize("decodes", [300, pytest.param(5000, marks=pytest.mark.full)])
def test_d9_memory_does_not_grow_with_decodes(decodes: int, tmp_path: Path) -> None:
    """Growth of less than 1 % in 1 000 decodes, after a third of them to warm up."""
    path = write_video(tmp_path / "v.mp4", 2)
    sizes = []
    for number in range(decodes):
        read_video(path, height=32, width=48, scratch=tmp_path)
        if number >= decodes // 3:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
    slope = np.polyfit(range(len(sizes)), sizes, 1)[0]
    assert slope * 1000 < 0.01 * sizes[0]
