"""Decoding to a size, frame rates, and files that are not what they claim."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gossamer.train.data.shots import find_shots
from gossamer.train.data.video import BadClip, read_video


def test_a_wide_video_covers_the_size_and_keeps_its_centre(
    make_video: Callable, tmp_path: Path
) -> None:
    path = make_video(tmp_path / "wide.mp4", (3,), height=32, width=128)
    whole = read_video(path, height=32, width=128, scratch=tmp_path).frames
    cropped = read_video(path, height=32, width=48, scratch=tmp_path).frames
    assert cropped.shape == (3, 32, 48, 3) and cropped.dtype == np.uint8
    assert np.array_equal(cropped, whole[:, :, 40:88])


def test_shots_are_found_at_the_joins_of_the_video(make_video: Callable, tmp_path: Path) -> None:
    path = make_video(tmp_path / "shots.mp4", (8, 6, 9))
    footage = read_video(path, height=16, width=24, scratch=tmp_path)
    shots = find_shots(footage.histogram_distance, footage.change)
    assert [(shot.start, shot.end) for shot in shots] == [(0, 8), (8, 14), (14, 23)]
    assert footage.fps == 12


@pytest.mark.parametrize(("fps", "expected"), [(None, 12), (6, 6), (4, 4), (24, 24)])
def test_frames_are_dropped_or_repeated_for_the_rate(
    make_video: Callable, tmp_path: Path, fps: float | None, expected: int
) -> None:
    path = make_video(tmp_path / "rate.mp4", (12,), fps=12)
    footage = read_video(path, height=32, width=48, scratch=tmp_path, fps=fps)
    assert len(footage.frames) == expected
    assert footage.fps == (fps or 12)


def test_wide_frames_go_only_as_far_as_the_source_has_detail(
    make_video: Callable, tmp_path: Path
) -> None:
    path = make_video(tmp_path / "large.mp4", (2,), height=64, width=96)
    small = read_video(path, height=32, width=48, scratch=tmp_path, zoom=1 / 0.6)
    assert small.wide.shape[1:3] == (53, 80)
    same = read_video(path, height=64, width=96, scratch=tmp_path, zoom=1 / 0.6)
    assert same.wide is same.frames


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le"])
def test_other_pixel_formats_and_odd_targets_decode(
    make_video: Callable, tmp_path: Path, pix_fmt: str
) -> None:
    path = make_video(tmp_path / "format.mp4", (2,), pix_fmt=pix_fmt)
    assert read_video(path, height=17, width=23, scratch=tmp_path).frames.shape == (2, 17, 23, 3)


def test_broken_files_are_bad_clips_with_a_reason(make_video: Callable, tmp_path: Path) -> None:
    good = make_video(tmp_path / "good.mp4", (8,)).read_bytes()
    for name, content in {
        "truncated.mp4": good[: len(good) * 2 // 3],
        "empty.mp4": b"",
        "text.mp4": b"not a video" * 50,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadClip) as error:
            read_video(tmp_path / name, height=32, width=48, scratch=tmp_path)
        assert error.value.reason and "\n" not in error.value.reason
    with pytest.raises(BadClip, match="FileNotFound"):
        read_video(tmp_path / "gone.mp4", height=32, width=48, scratch=tmp_path)


def test_a_sound_file_is_a_bad_clip(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadClip, match="no video stream"):
        read_video(tmp_path / "sound.mp4", height=32, width=48, scratch=tmp_path)
