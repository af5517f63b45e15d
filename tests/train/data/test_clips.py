"""Clips stay inside shots, splits are by time, copies are seeded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.train.data.clips import Clip, clip_pixels, evenly, held_out, plan_clips, with_copies
from gossamer.train.data.shots import Shot
from gossamer.train.data.video import Footage


def plan(shots: list[Shot], **changes) -> tuple:  # type: ignore[no-untyped-def]
    settings = {
        "frames": 4, "stride": 3, "min_motion": 0.3, "holdout": 0.25, "position": 0, "total": 1
    }  # fmt: skip
    return plan_clips("v.mp4", shots, **{**settings, **changes})


def test_clips_never_cross_a_shot_and_start_every_stride() -> None:
    clips, skipped = plan(
        [Shot(0, 11, 1.0), Shot(11, 14, 1.0), Shot(14, 20, 0.1), Shot(20, 24, 1.0)]
    )
    assert [clip.start for clip in clips] == [0, 3, 6, 20]
    assert [clip.split for clip in clips] == ["train"] * 3 + ["heldout"]
    assert [(shot.start, shot.reason.split(":")[0]) for shot in skipped] == [
        (11, "shorter than 4 frames"),
        (14, "static"),
    ]
    assert clips[1].clip_id == "v.mp4@000003"


def test_short_videos_are_held_out_whole_and_films_by_their_own_shots() -> None:
    short, film = [Shot(0, 4, 1.0)], [Shot(4 * i, 4 * i + 4, 1.0) for i in range(8)]
    assert [plan(short, position=p, total=8)[0][0].split for p in (0, 5, 6, 7)] == [
        "train", "train", "heldout", "heldout"
    ]  # fmt: skip
    splits = [clip.split for clip in plan(film, position=0, total=8)[0]]
    assert splits == ["train"] * 6 + ["heldout"] * 2


def test_a_film_whose_last_shots_are_useless_holds_out_the_last_useful_one() -> None:
    shots = [Shot(0, 4, 1.0), Shot(4, 8, 1.0), Shot(8, 12, 0.0), Shot(12, 14, 1.0)]
    assert [clip.split for clip in plan(shots)[0]] == ["train", "heldout"]


def test_a_film_of_one_shot_holds_out_its_end_in_frames_of_their_own() -> None:
    clips, _ = plan([Shot(0, 40, 1.0)], stride=1)
    train = [clip.start + clip.frames for clip in clips if clip.split == "train"]
    held = [clip.start for clip in clips if clip.split == "heldout"]
    assert (max(train), min(held), max(held) + 4) == (30, 30, 40)
    clips, _ = plan([Shot(0, 9, 1.0)], stride=1)
    assert {clip.split for clip in clips} == {"train", "heldout"}
    assert {clip.split for clip in plan([Shot(0, 7, 1.0)], stride=1)[0]} == {"train"}
    assert {clip.split for clip in plan([Shot(0, 40, 1.0)], holdout=0.0)[0]} == {"train"}


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(10, 0.3, 3), (2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.0, 0)],
)
def test_the_held_out_share_is_rounded_and_leaves_both_parts(
    total: int, share: float, count: int
) -> None:
    assert sum(held_out(position, total, share) for position in range(total)) == count


def test_evenly_keeps_order_and_spreads() -> None:
    assert evenly(range(10), 2) == [2, 7]
    assert evenly(range(3), None) == evenly(range(3), 5) == [0, 1, 2]
    assert len(set(evenly(range(101), 40))) == 40


def test_only_train_clips_get_copies() -> None:
    shot = Shot(0, 4, 1.0)
    clips = [Clip("a", 0, 4, shot, "train"), Clip("b", 0, 4, shot, "heldout")]
    assert [clip.clip_id for clip in with_copies(clips, 2)] == ["a", "a+1", "a+2", "b"]


def footage(height: int = 20, width: int = 30) -> Footage:
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([x * 8, y * 12, np.full_like(x, 20 * f)], -1) for f in range(4)])
    frames = frames.astype(np.uint8)
    return Footage(frames, frames, 24.0, np.zeros(3), np.zeros(3))


def test_the_clip_itself_is_exact() -> None:
    pixels, done = clip_pixels(footage(), Clip("a", 1, 2, Shot(0, 4, 1.0), "train"), seed=0)
    assert done == ""
    expected = footage().frames[1:3].transpose(3, 0, 1, 2).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


def test_copies_do_what_they_record_and_repeat_by_seed() -> None:
    seen = set()
    for copy in range(1, 25):
        clip = Clip(f"a+{copy}", 0, 4, Shot(0, 4, 1.0), "train", copy)
        pixels, done = clip_pixels(footage(), clip, seed=7)
        again, _ = clip_pixels(footage(), clip, seed=7)
        assert torch.equal(pixels, again) and pixels.shape == (3, 4, 20, 30)
        rightward = (pixels[0, :, :, -1] - pixels[0, :, :, 0]).mean() > 0
        later_is_bluer = pixels[2, -1].mean() > pixels[2, 0].mean()
        assert bool(rightward) is ("flip" not in done)
        assert bool(later_is_bluer) is ("reverse" not in done)
        spread = (pixels[0].amax() - pixels[0].amin()) / (29 * 8 / 127.5)
        assert 0.5 < spread <= 1.001
        seen.add(done)
    assert seen == {"crop", "crop+flip", "crop+reverse", "crop+flip+reverse"}
    assert not torch.equal(clip_pixels(footage(), clip, seed=8)[0], pixels)


def test_scratch_files_leave_nothing_behind(tmp_path: Path, make_video) -> None:  # type: ignore[no-untyped-def]
    from gossamer.train.data.video import read_video

    path = make_video(tmp_path / "v.mp4", (3,))
    (tmp_path / "scratch").mkdir()
    kept = read_video(path, height=32, width=48, scratch=tmp_path / "scratch")
    assert kept.frames.max() > 0
    assert not list((tmp_path / "scratch").iterdir())
