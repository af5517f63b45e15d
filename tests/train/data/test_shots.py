"""Cuts where both signals jump or the change is extreme; motion by a plain mean."""

import numpy as np
import pytest

from gossamer.train.data.shots import ChangeMeter, Shot, find_shots


def test_signals_equal_their_definition() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 10, 3), dtype=np.uint8)
    meter = ChangeMeter()
    for frame in frames:
        meter.add(frame)
    distance, change = meter.signals()
    grey = frames.astype(np.float64).mean(axis=-1)
    for index in range(3):
        before, after = (
            np.histogram(grey[index + i], bins=32, range=(0, 256))[0] / 60 for i in (0, 1)
        )
        assert distance[index] == pytest.approx(np.abs(before - after).sum())
        assert change[index] == pytest.approx(
            np.abs(grey[index] - grey[index + 1]).mean(), rel=1e-5
        )


def test_a_cut_needs_both_signals_or_an_extreme_change() -> None:
    distance = np.array([0.9, 0.4, 0.6, 0.1, 0.0])
    change = np.array([13.0, 20.0, 11.0, 36.0, 2.0])
    assert [(shot.start, shot.end) for shot in find_shots(distance, change)] == [
        (0, 1),
        (1, 4),
        (4, 6),
    ]


def test_motion_leaves_out_the_cut_itself() -> None:
    shots = find_shots(np.array([0.0, 0.0, 1.0, 0.0]), np.array([1.0, 3.0, 50.0, 4.0]))
    assert shots == [Shot(0, 3, 2.0), Shot(3, 5, 4.0)]


def test_one_frame_is_one_shot_without_motion() -> None:
    assert find_shots(np.array([]), np.array([])) == [Shot(0, 1, 0.0)]
