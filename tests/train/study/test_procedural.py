"""The procedural film: the same from the same seed, moving, and cut into its shots by encoding."""

from pathlib import Path

import numpy as np
import pytest

from gossamer.train.codec import PCACodec
from gossamer.train.data.encode import encode
from gossamer.train.study.__main__ import main
from gossamer.train.study.procedural import draw_shot
from gossamer.train.text import HashedWords


def test_a_shot_is_its_seeds_and_moves_in_every_frame() -> None:
    first, again, other = (
        np.stack(list(draw_shot(6, 48, 64, seed=seed))).astype(float)
        for seed in ((0, 1), (0, 1), (0, 2))
    )
    assert np.array_equal(first, again) and np.abs(first - other).mean() > 20
    assert np.abs(np.diff(first, axis=0)).mean((1, 2, 3)).min() > 0.3


def test_encoding_finds_its_shots_and_takes_training_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = tmp_path / "other.mp4"
    assert main(["film", str(film), "--shots", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(film)
    manifest = encode(
        str(film), tmp_path / "data", codec=PCACodec(patch=(2, 4, 4), channels=4),
        text=HashedWords(dim=16, length=4), frames=32, height=32, width=64, stride=32, holdout=0.34,
        condition="first_last",
    )  # fmt: skip
    assert manifest.sources[0]["frames"] == 3 * 64 and manifest.sources[0]["shots"] == 3
    assert manifest.splits == {"train": 4, "heldout": 2}
