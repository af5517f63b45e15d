"""Measures of likeness against their formulas, written out with NumPy."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gossamer.train import quality
from gossamer.train.refusal import Refusal


@pytest.fixture
def pair() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chance = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 3, 16, 18, 3), generator=chance, dtype=torch.uint8)
    noise = torch.randint(-40, 41, a.shape, generator=chance)
    yield a, (a.int() + noise).clamp(0, 255).to(torch.uint8)


def decibel(error: np.ndarray) -> float:
    return 20 * math.log10(255 / math.sqrt((error.astype(float) ** 2).mean()))


def test_psnr_and_temporal_psnr_are_taken_clip_by_clip(pair: tuple) -> None:
    a, b = (x.numpy().astype(float) for x in pair)
    found = quality.compare(*pair)
    for clip in range(2):
        assert found["psnr"][clip] == pytest.approx(decibel(a[clip] - b[clip]))
        changes = [x[clip, 1:] - x[clip, :-1] for x in (a, b)]
        assert found["temporal_psnr"][clip] == pytest.approx(decibel(changes[0] - changes[1]))


def test_ssim_equals_its_formula_at_every_window(pair: tuple) -> None:
    a, b = (x.numpy().astype(float) for x in pair)
    at = np.arange(11) - 5
    weight = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(weight, weight) / weight.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for frame in range(3):
        for channel in range(3):
            for top in range(16 - 10):
                for left in range(18 - 10):
                    part = np.s_[1, frame, top : top + 11, left : left + 11, channel]
                    x, y = a[part], b[part]
                    mx, my = (window * x).sum(), (window * y).sum()
                    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                    cov = (window * (x - mx) * (y - my)).sum()
                    top_part = (2 * mx * my + c1) * (2 * cov + c2)
                    values.append(top_part / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert quality.ssim(*pair)[1] == pytest.approx(np.mean(values), rel=1e-10)


def test_measures_are_the_same_under_autocast() -> None:
    chance = torch.Generator().manual_seed(1)
    flat = torch.full((1, 2, 16, 18, 3), 200)  # of low variance, as skies are
    pair = [
        (flat + torch.randint(-2, 3, flat.shape, generator=chance)).to(torch.uint8)
        for _ in range(2)
    ]
    expected = quality.compare(*pair)
    assert 0 < expected["ssim"][0] < 1
    with torch.autocast("cpu", torch.bfloat16):
        assert quality.compare(*pair) == expected


def test_equal_videos_are_as_alike_as_can_be(pair: tuple) -> None:
    found = quality.compare(pair[0], pair[0])
    assert found["ssim"] == pytest.approx([1, 1]) and min(found["psnr"]) > 100


def test_measures_without_their_program_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(Refusal, match="pip install imageio-ffmpeg, or leave it out"):
        quality.check_extra(["vmaf"])
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    with pytest.raises(Refusal, match="pip install flip-evaluator, or leave it out"):
        quality.check_extra(["flip"])
    quality.check_extra([])


def test_flip_is_zero_for_equal_frames_and_grows_with_noise(pair: tuple) -> None:
    pytest.importorskip("flip_evaluator")
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64)[..., None].expand(-1, -1, -1, 3)
    noise = torch.randint(0, 90, ramp.shape, generator=torch.Generator().manual_seed(0))
    found = [quality.flip((ramp + part).to(torch.uint8), ramp) for part in (noise // 4, noise)]
    assert quality.flip(ramp, ramp) == 0 < found[0] < found[1] <= 1


def test_vmaf_falls_with_noise(pair: tuple) -> None:
    pytest.importorskip("imageio_ffmpeg")
    ramp = torch.arange(128, dtype=torch.uint8).expand(4, 72, 128)[..., None].expand(-1, -1, -1, 3)
    noise = torch.randint(0, 90, ramp.shape, generator=torch.Generator().manual_seed(0))
    assert quality.vmaf(ramp, ramp) > 90 > quality.vmaf((ramp + noise).to(torch.uint8), ramp)
