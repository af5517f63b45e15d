"""Videos to shards: rows against the codec, the no-op, the refusals, what is left out."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from gossamer.train.codec import PCACodec, load_codec
from gossamer.train.data.encode import encode
from gossamer.train.data.shards import Manifest, Row, ShardWriter, from_bytes
from gossamer.train.data.unfinished import BEGUN
from gossamer.train.data.video import read_video
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import LOCK
from gossamer.train.text import HashedWords

SMALL = {"height": 32, "width": 48, "frames": 4, "stride": 4}


def run(source: Path, out: Path, **changes) -> Manifest:  # type: ignore[no-untyped-def]
    settings = {
        "codec": PCACodec(channels=12),
        "text": HashedWords(dim=8, length=6),
        **SMALL,
        **changes,
    }
    return encode(source, out, **settings)


def rows(out: Path) -> list[dict]:
    return [
        row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


@pytest.fixture
def film(make_video: Callable, tmp_path: Path) -> Path:
    path = make_video(tmp_path / "film.mp4", (9, 8, -8, 3, 12))
    (tmp_path / "film.txt").write_text("a square that runs")
    return path


def test_rows_are_what_the_saved_codec_makes_of_the_decoded_frames(
    film: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    manifest = run(film, out)
    codec = load_codec(out / "codec")
    frames = read_video(film, height=32, width=48, scratch=tmp_path).frames
    found = rows(out)
    splits = {row["start"]: row["split"] for row in found}
    held_out = dict.fromkeys((28, 32, 36), "heldout")
    assert splits == {**dict.fromkeys((0, 4, 9, 13), "train"), **held_out} and len(found) == 7
    assert manifest.splits == {"heldout": 3, "train": 4}
    for row in found:
        clip = torch.tensor(frames[row["start"] : row["start"] + 4]).permute(3, 0, 1, 2)
        video = (clip.float() / 127.5 - 1)[None]
        latent, condition = (
            from_bytes(row[key], row[f"{key}_shape"]) for key in ("latent", "condition")
        )
        torch.testing.assert_close(
            latent, codec.encode(video)[0].bfloat16().float(), atol=2e-2, rtol=1e-2
        )
        held = codec.encode(video[:, :, :1].repeat(1, 1, 4, 1, 1))[0]
        torch.testing.assert_close(condition, held.bfloat16().float(), atol=2e-2, rtol=1e-2)
        text = from_bytes(row["text"], row["text_shape"])
        torch.testing.assert_close(
            text, HashedWords(dim=8, length=6).encode([row["prompt"]])[0, :4].bfloat16().float()
        )
        assert row["prompt"] == "a square that runs"
        assert row["shot_start"] <= row["start"] and row["start"] + 4 <= row["shot_end"]
        assert row["content_sha256"] == hashlib.sha256(clip.contiguous().numpy()).hexdigest()


def test_a_clip_between_two_frames_holds_each_for_half_of_it(film: Path, tmp_path: Path) -> None:
    run(film, tmp_path / "data", condition="first_last")
    codec = load_codec(tmp_path / "data" / "codec")
    frames = read_video(film, height=32, width=48, scratch=tmp_path).frames
    for row in rows(tmp_path / "data"):
        clip = torch.tensor(frames[row["start"] : row["start"] + 4]).permute(3, 0, 1, 2)
        video = (clip[:, [0, 0, 3, 3]].float() / 127.5 - 1)[None]
        condition = from_bytes(row["condition"], row["condition_shape"])
        held = codec.encode(video)[0].bfloat16().float()
        torch.testing.assert_close(condition, held, atol=2e-2, rtol=1e-2)


def test_the_codec_is_fitted_on_train_clips_only(make_video: Callable, tmp_path: Path) -> None:
    prints = []
    for name, levels in (("a", (8, 8)), ("b", (8, 12))):
        source = make_video(tmp_path / f"{name}.mp4", levels)
        prints.append(run(source, tmp_path / name, holdout=0.5).codec["fingerprint"])
    assert prints[0] == prints[1]


def test_skipped_shots_are_listed_with_their_reason(film: Path, tmp_path: Path) -> None:
    run(film, tmp_path / "data")
    lines = [
        json.loads(line) for line in (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    ]
    assert [(line["start"], line["reason"][:6]) for line in lines] == [
        (17, "static"),
        (25, "shorte"),
    ]


def test_every_column_of_the_row_is_in_the_shard(film: Path, tmp_path: Path) -> None:
    run(film, tmp_path / "data", condition="none")
    first = rows(tmp_path / "data")[0]
    assert set(first) == set(Row.__dataclass_fields__)
    assert first["condition"] == b"" and first["condition_shape"] == []


def test_encoding_again_changes_nothing_and_another_request_is_refused(
    film: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    first = run(film, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(film, out, num_workers=1) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(Refusal, match=r"out_dir=.*stride there: 4, asked: 2"):
        run(film, out, stride=2)
    film.with_suffix(".txt").write_text("another caption")
    with pytest.raises(Refusal, match="sources there"):
        run(film, out)


def test_the_same_request_gives_the_same_bytes(film: Path, tmp_path: Path) -> None:
    shards = [run(film, tmp_path / name, augment=1).shards for name in ("a", "b")]
    assert shards[0] == shards[1]


def test_an_unfinished_encode_is_cleared_but_foreign_files_are_not(
    film: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "train-00007.parquet").write_bytes(b"half")
    (out / ".train-00008.parquet.77.tmp").write_bytes(b"half")
    run(film, out)
    assert sorted(path.name for path in out.glob("*") if "parquet" in path.name) == [
        "heldout-00000.parquet",
        "train-00000.parquet",
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(Refusal, match=r"thesis\.tex"):
        run(film, other)
    assert (other / "thesis.tex").exists()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the clips of each call of the codec."""
    own, found = PCACodec.encode, []

    def encode(self: PCACodec, pixels: Tensor) -> Tensor:
        found.append(len(pixels))
        return own(self, pixels)

    monkeypatch.setattr(PCACodec, "encode", encode)
    return found


def stopped(source: Path, out: Path, after: int, **settings: Any) -> None:
    """Encode until `after` shards are whole and end there, as a kill does."""
    own = ShardWriter._flush

    def flush(self: ShardWriter, key: Any) -> None:
        if len(self.shards) == after:
            raise KeyboardInterrupt
        own(self, key)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "_flush", flush)
        run(source, out, **settings)


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("is_one", [False, True])
def test_an_encode_that_ended_early_goes_on_after_its_last_shard(
    is_one: bool, after: int, film: Path, many: Path, tmp_path: Path, encoded: list[int]
) -> None:
    settings: dict[str, Any] = {"rows_per_shard": 2, "augment": 1, "batch_size": 2}
    settings |= {"condition": "none"} if is_one else {"holdout": 0.25}
    source = film if is_one else many
    run(source, tmp_path / "whole", **settings)
    all_clips = sum(encoded)
    out = tmp_path / "data"
    stopped(source, out, after, **settings)
    if after == 2:  # as often as it takes
        stopped(source, out, 4, **settings)
    encoded.clear()
    again = run(source, out, **settings)
    assert content(out) == content(tmp_path / "whole")
    assert again == Manifest.load(tmp_path / "whole")
    assert sum(encoded) < all_clips, "what was there is not encoded again"


@pytest.mark.parametrize("what", ["shard", "list", "request"])
def test_what_an_encode_left_is_not_taken_where_it_is_damaged_or_of_something_else(
    what: str, film: Path, tmp_path: Path, encoded: list[int]
) -> None:
    settings: dict[str, Any] = {"rows_per_shard": 2, "condition": "none"}
    wanted = {**settings, "holdout": 0.5} if what == "request" else settings
    run(film, tmp_path / "whole", **wanted)
    all_clips = sum(encoded)
    out = tmp_path / "data"
    stopped(film, out, 2, **settings)
    if what == "shard":
        shard = out / "train-00000.parquet"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    elif what == "list":
        (out / BEGUN).write_text((out / BEGUN).read_text()[:40])
    encoded.clear()
    run(film, out, **wanted)
    assert content(out) == content(tmp_path / "whole") and sum(encoded) == all_clips


def test_shards_are_cut_by_rows_and_named_by_split(film: Path, tmp_path: Path) -> None:
    manifest = run(film, tmp_path / "data", rows_per_shard=3)
    assert [(shard.file, shard.rows) for shard in manifest.shards] == [
        ("train-00000.parquet", 3),
        ("heldout-00000.parquet", 3),
        ("train-00001.parquet", 1),
    ]


def test_copies_are_made_of_train_clips_only(film: Path, tmp_path: Path) -> None:
    assert run(film, tmp_path / "data", augment=2).splits == {"heldout": 3, "train": 12}
    copies = [row for row in rows(tmp_path / "data") if row["augment"]]
    assert len(copies) == 8 and all("+" in row["clip_id"] for row in copies)
    assert len({row["content_sha256"] for row in rows(tmp_path / "data")}) == 15


def test_max_clips_limits_the_clips(film: Path, tmp_path: Path) -> None:
    assert sum(run(film, tmp_path / "data", max_clips=4).splits.values()) == 4


@pytest.fixture
def many(make_video: Callable, tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    for number in range(20):
        make_video(folder / f"{number:02d}.mp4", (4 + number % 3,), first_level=number)
    return folder


def test_a_bad_video_is_skipped_and_listed(many: Path, tmp_path: Path) -> None:
    (many / "05b.mp4").write_bytes(b"not a video")
    manifest = run(many, tmp_path / "data", holdout=0.25)
    (line,) = (tmp_path / "data/bad_clips.jsonl").read_text().splitlines()
    assert json.loads(line)["video"] == "05b.mp4" and "Invalid" in json.loads(line)["reason"]
    assert manifest.bad_clips == 1 and manifest.splits == {"heldout": 5, "train": 15}
    held = {row["source"] for row in rows(tmp_path / "data") if row["split"] == "heldout"}
    assert held == {f"{number}.mp4" for number in range(15, 20)}


def test_the_number_of_workers_changes_no_byte(many: Path, tmp_path: Path) -> None:
    shards = [run(many, tmp_path / f"data{n}", num_workers=n).shards for n in (0, 4)]
    assert shards[0] == shards[1]


def test_more_than_five_percent_bad_is_refused_with_the_first_five(
    many: Path, tmp_path: Path
) -> None:
    for number in range(7):
        (many / f"bad{number}.mp4").write_bytes(b"")
    with pytest.raises(Refusal, match=r"7 of 27 videos.*bad0\.mp4.*bad4\.mp4") as error:
        run(many, tmp_path / "data")
    assert "bad5.mp4" not in str(error.value)
    assert len((tmp_path / "data/bad_clips.jsonl").read_text().splitlines()) == 7
    assert Manifest.load(tmp_path / "data") is None


def test_a_single_bad_video_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"not a video")
    with pytest.raises(Refusal, match=r"1 of 1 videos unusable.*v\.mp4: InvalidDataError"):
        run(tmp_path / "v.mp4", tmp_path / "data")


def test_no_clip_left_is_refused_and_says_why(make_video: Callable, tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mp4", (3, -9))
    with pytest.raises(Refusal, match=r"0 clips.*shorter than 4 frames.*static"):
        run(source, tmp_path / "data")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 0),
        ("height", 30),
        ("frames", 3),
        ("stride", 0),
        ("fps", 0),
        ("holdout", 1.0),
        ("min_motion", -1),
        ("condition", "last"),
        ("augment", -1),
        ("max_clips", 0),
        ("rows_per_shard", 0),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(
    tmp_path: Path, field: str, value: object
) -> None:
    (tmp_path / "v.mp4").write_bytes(b"never opened")
    with pytest.raises(Refusal) as error:
        run(tmp_path / "v.mp4", tmp_path / "data", **{field: value})
    assert error.value.field == field
    assert not (tmp_path / "data").exists()
