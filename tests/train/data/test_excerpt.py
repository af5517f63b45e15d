"""The excerpt that the demonstration ships: its licence note, its shots and its split."""

import hashlib
from pathlib import Path

import gossamer.recipes
from gossamer.train.data.clips import plan_clips
from gossamer.train.data.shots import find_shots
from gossamer.train.data.sources import list_sources
from gossamer.train.data.video import read_video

DEMO = Path(gossamer.recipes.__file__).parent / "demo"
HELD_OUT_FROM = 1429


def test_the_excerpt_is_small_and_attributed() -> None:
    video = DEMO / "bbb_excerpt.mp4"
    note = (DEMO / "ATTRIBUTION.md").read_text()
    assert video.stat().st_size <= 3_000_000
    assert "(c) 2008 Blender Foundation" in note and "CC BY 3.0" in note
    assert hashlib.sha256(video.read_bytes()).hexdigest() in note


def test_holdout_035_is_exactly_the_second_part(tmp_path: Path) -> None:
    (item,) = list_sources(DEMO / "bbb_excerpt.mp4")
    assert item.caption == ""  # the teacher was trained with the empty prompt
    footage = read_video(item.path, height=72, width=128, scratch=tmp_path)
    shots = find_shots(footage.histogram_distance, footage.change)
    assert len(shots) == 26 and len(footage.frames) == 1916
    clips, skipped = plan_clips(
        item.name, shots, frames=16, stride=8, min_motion=0.3, holdout=0.35, position=0, total=1
    )
    assert not skipped
    assert all((clip.split == "heldout") == (clip.start >= HELD_OUT_FROM) for clip in clips)
    assert len({clip.shot for clip in clips if clip.split == "heldout"}) == 9
