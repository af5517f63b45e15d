"""Noise: each sample's own, along the path that the velocity is the slope of."""

import math
from statistics import NormalDist

import pytest
import torch

from gossamer.train.noise import LogNormal, Shifted, Uniform, add_noise, mix, sample_noise
from gossamer.train.samples import noisy_samples

SHAPE = (4, 3, 4, 6)  # [C, f, h, w]


def test_a_sample_depends_on_its_seed_alone() -> None:
    latent = torch.zeros(4, *SHAPE)
    seeds = [(0, 10), (0, 11), (0, 12), (1, 10)]
    torch.manual_seed(1)
    t, noise = sample_noise(Uniform(), latent, seeds)
    torch.manual_seed(2)
    for place, seed in enumerate(seeds):
        alone_t, alone = sample_noise(Uniform(), latent[:1], [seed])
        assert torch.equal(alone[0], noise[place]) and torch.equal(alone_t[0], t[place])
    assert len(set(t.tolist())) == 4
    assert len({float(x.sum()) for x in noise}) == 4


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    sample_noise(Uniform(), torch.zeros(1, *SHAPE), [(0, 0)])
    assert torch.equal(torch.rand(4), expected)


def test_noise_and_levels_have_their_distributions() -> None:
    count = 2000
    t, noise = sample_noise(
        Uniform(), torch.zeros(count, 1, 1, 2, 4), [(7, i) for i in range(count)]
    )
    ordered, grid = t.sort()[0], (torch.arange(count) + 0.5) / count
    assert float((ordered - grid).abs().max()) < 1.95 / count**0.5  # Kolmogorov-Smirnov, 0.1 %
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    first = noise.flatten(1)[:, 0] - noise.flatten(1)[:, 0].mean()
    assert abs(float((first * (t - t.mean())).mean())) < 4 * 0.29 / count**0.5  # independent of t


def test_the_path_goes_from_data_to_noise_with_the_velocity_as_its_slope() -> None:
    latent, noise = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    t, h = torch.tensor([0.2, 0.9], dtype=torch.float64), 1e-6
    assert torch.equal(add_noise(latent, noise, torch.zeros(2)), latent)
    assert torch.equal(add_noise(latent, noise, torch.ones(2)), noise)
    slope = (add_noise(latent, noise, t + h) - add_noise(latent, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, noise - latent, rtol=1e-6, atol=1e-6)


def test_shifted_levels_scale_the_ratio_of_noise_to_data() -> None:
    u = torch.rand(100, dtype=torch.float64)
    t = Shifted(shift=3.0)(u)
    torch.testing.assert_close(t / (1 - t), 3 * u / (1 - u))
    assert torch.equal(Shifted(shift=1.0)(u), u)


def test_log_normal_levels_are_the_quantiles_of_their_distribution() -> None:
    u = [0.01, 0.3, 0.5, 0.9]
    t = LogNormal(mean=1.5, std=1.6)(torch.tensor(u, dtype=torch.float64))
    expected = [NormalDist(1.5, 1.6).inv_cdf(x) for x in u]
    assert torch.logit(t).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("levels", [Uniform(), Shifted(shift=8.0), LogNormal()])
def test_levels_stay_strictly_between_data_and_noise(levels: Uniform) -> None:
    t = sample_noise(levels, torch.zeros(500, 1, 1, 1, 1), [(0, i) for i in range(500)])[0]
    assert t.dtype == torch.float32 and bool(((t > 0) & (t < 1)).all())


def test_mixed_seeds_do_not_meet() -> None:
    seeds = {
        mix(seed, place, *more) for seed in range(30) for place in range(300) for more in ((), (1,))
    }
    assert len(seeds) == 30 * 300 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def clip(index: int) -> dict[str, object]:
    latent = torch.full(SHAPE, float(index))
    return {"latent": latent, "text": torch.zeros(2, 3), "index": index}


def test_the_noise_of_an_evaluation_depends_on_clip_and_level_only() -> None:
    levels, cpu = [0.9, 0.5], torch.device("cpu")
    whole = noisy_samples([clip(i) for i in range(5)], levels, 2, cpu)
    assert [(s.level, len(s.t)) for s in whole] == [(n, size) for n in (0, 1) for size in (2, 2, 1)]
    parts = noisy_samples([clip(i) for i in (4, 1)], levels, 8, cpu)
    for level, t in enumerate(levels):
        x = torch.cat([s.x for s in whole if s.level == level])
        assert torch.equal(parts[level].x, x[[4, 1]])
        assert parts[level].t.tolist() == [t, t] or level == 0
        noise = (x - (1 - t) * torch.arange(5.0).view(5, 1, 1, 1, 1)) / t
        assert len({round(float(n.sum()), 3) for n in noise}) == 5


@pytest.mark.parametrize(
    ("levels", "settings"),
    [
        (Shifted, {"shift": 0.0}),
        (Shifted, {"shift": math.inf}),
        (LogNormal, {"mean": math.nan}),
        (LogNormal, {"std": 0.0}),
        (LogNormal, {"std": math.inf}),
    ],
)
def test_a_distribution_of_no_levels_is_refused(
    levels: type[Shifted | LogNormal], settings: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*finite number"):
        levels(**settings)
